"""The core, two of them in memory, with the card's real engine: any chunking, and turns out of order."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secfunet.apdu import status_error
from secfunet.card import NegotiatedTls, TlsParameters
from secfunet.tandem.connection import AskCard, StartCard, TandemConnection, TandemState
from secfunet.tandem.errors import HandshakeRefusedError, WrongTurnError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secfunet.tls.errors import (
    PeerAlertError,
    ServerNameError,
    TlsError,
    TlsProtocolError,
    TruncatedStreamError,
)
from tests.support.pki import CertificateAuthority
from tests.tandem.engine_card import EngineCard, Host

AUTHORITY = CertificateAuthority()
CLIENT, SERVER = EngineCard(AUTHORITY), EngineCard(AUTHORITY)


def hosts(parameters: TandemParameters, client: EngineCard = CLIENT, server: EngineCard = SERVER) -> tuple[Host, Host]:
    return (
        Host(TandemConnection("client", parameters, server_name="localhost"), client),
        Host(TandemConnection("server", parameters), server),
    )


def shake(client: Host, server: Host, cut) -> tuple[bytearray, bytearray]:
    """Carry bytes in pieces of ``cut()`` until both are open; return what is still under way to the client and to the server."""
    to_server, to_client = bytearray(client.work()), bytearray(server.work())
    for _ in range(100_000):
        if client.core.state is server.core.state is TandemState.OPEN:
            return to_client, to_server
        for wire, here, back in ((to_server, server, to_client), (to_client, client, to_server)):
            if here.core.state is TandemState.OPEN:
                continue
            piece = bytes(wire[: cut()])
            del wire[: len(piece)]
            here.core.incoming.feed(piece)
            here.core.received()
            back += here.work()
    raise AssertionError("no end")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_handshakes_and_data_in_any_chunks(data: st.DataObject) -> None:
    version = data.draw(st.sampled_from([TLS_1_2, TLS_1_3]))
    parameters = TandemParameters(min_version=version, max_version=version, resume=data.draw(st.booleans()))
    client, server = hosts(parameters)
    sizes = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=10))
    turns = itertools.cycle(sizes)
    to_client, to_server = shake(client, server, lambda: next(turns))
    sent = data.draw(st.binary(min_size=1, max_size=2000))
    for here, there, wire in ((client, server, to_server), (server, client, to_client)):
        wire += here.core.stream.seal(sent)
        got = b""
        while len(got) < len(sent):
            size = next(turns)
            there.core.incoming.feed(bytes(wire[:size]))
            del wire[:size]
            got += there.core.stream.receive()
        assert got == sent
    assert client.core.negotiated is not None
    assert server.core.negotiated is not None
    assert client.core.negotiated.resumed == server.core.negotiated.resumed


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_data_right_behind_the_finished_waits_for_the_host(version: int) -> None:
    client, server = hosts(TandemParameters(min_version=version, max_version=version, resume=False))
    to_server = bytearray(client.work())
    while client.core.state is not TandemState.OPEN:
        server.core.incoming.feed(bytes(to_server))
        server.core.received()
        to_server.clear()
        client.core.incoming.feed(server.work())
        client.core.received()
        to_server += client.work()
    # 36 bytes: in TLS 1.3 a record as long as a Finished.
    server.core.incoming.feed(bytes(to_server) + client.core.stream.seal(b"x" * 36) + client.core.stream.seal(b"tail"))
    server.core.received()
    server.work()
    assert server.core.state is TandemState.OPEN
    assert server.core.stream.receive() == b"x" * 36 + b"tail"


def test_few_questions_are_asked() -> None:
    for version, most in ((TLS_1_2, (3, 2)), (TLS_1_3, (2, 2))):
        cards = EngineCard(AUTHORITY), EngineCard(AUTHORITY)
        client, server = hosts(TandemParameters(min_version=version, max_version=version), *cards)
        shake(client, server, lambda: 100_000)
        assert (cards[0].questions, cards[1].questions) == most


def test_a_clients_certificate_that_has_expired() -> None:
    for version in (TLS_1_2, TLS_1_3):
        client, server = hosts(
            TandemParameters(min_version=version, max_version=version), EngineCard(AUTHORITY, expired=True)
        )
        with pytest.raises(HandshakeRefusedError):
            shake(client, server, lambda: 100_000)
        client.core.incoming.feed(server.core.take_output())
        look = client.core.stream.receive if client.core.state is TandemState.OPEN else client.core.received
        with pytest.raises(PeerAlertError, match="certificate_expired"):
            look()


def test_a_server_of_another_name_is_told_bad_certificate() -> None:
    client, server = hosts(TandemParameters(), server=EngineCard(AUTHORITY, name="elsewhere.example"))
    with pytest.raises(ServerNameError):
        shake(client, server, lambda: 100_000)
    server.core.incoming.feed(client.core.take_output())
    server.core.received()
    server.work()
    with pytest.raises(PeerAlertError, match="bad_certificate"):
        server.core.stream.receive()


def test_turns_are_kept() -> None:
    core = TandemConnection("client", TandemParameters(), server_name="localhost")
    with pytest.raises(WrongTurnError):
        core.card_answered(b"")
    with pytest.raises(WrongTurnError):
        _ = core.stream
    core.start()
    with pytest.raises(WrongTurnError):
        core.start()
    assert core.next_command() == StartCard()
    assert core.next_command() is None
    with pytest.raises(WrongTurnError):
        core.card_waits()
    with pytest.raises(WrongTurnError):
        TandemConnection("client", TandemParameters())


def test_a_card_without_an_answer_or_with_nonsense_ends_it() -> None:
    for answer, error in (
        (b"", HandshakeRefusedError),
        (b"nonsense", TlsError),
        (b"\x15\x03\x03\x00\x02\x02\x28", HandshakeRefusedError),
    ):
        core = TandemConnection("client", TandemParameters(), server_name="localhost")
        core.start()
        with pytest.raises(error):
            core.card_answered(answer)
        assert core.state is TandemState.FAILED
        assert core.next_command() is None


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["client", "server"]), st.binary(max_size=300))
def test_any_bytes_in_place_of_a_hello(role, untrusted: bytes) -> None:
    core = TandemConnection(role, TandemParameters(), server_name="localhost")
    core.start()
    if role == "client":
        core.next_command()
        core.card_answered(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00")
        core.take_output()
    core.incoming.feed(untrusted)
    try:
        core.received()
        command = core.next_command()
        assert command is None or isinstance(command, AskCard)
        if command is None:
            with pytest.raises(TruncatedStreamError):
                core.received_eof()
    except TlsProtocolError:
        assert core.take_output()[:1] == b"\x15"
        assert core.state is TandemState.FAILED
    except TlsError:
        assert core.state is TandemState.FAILED


def test_an_application_protocol_that_was_not_offered() -> None:
    """RFC 7301, 3.1: a server chooses among what the client offers; a card that says otherwise is not believed."""

    class OtherProtocol(EngineCard):
        async def cipher_suite(self) -> NegotiatedTls:
            return dataclasses.replace(await super().cipher_suite(), alpn="smtp")

    client, server = hosts(TandemParameters(alpn=("h2",)), OtherProtocol(AUTHORITY))
    with pytest.raises(TlsProtocolError, match="nobody offered"):
        shake(client, server, lambda: 100_000)
    assert client.core.state is TandemState.FAILED
    assert client.core.take_output(), "the server is told, under the keys of the connection"


class OlderCard(EngineCard):
    """Of a version before the flag "report" and the port: it refuses what it does not know, and reports nothing."""

    refused = 0

    async def set_tls_parameters(self, parameters: TlsParameters) -> None:
        if parameters.report or parameters.server_port:
            self.refused += 1
            raise status_error(0x6A80, 0x82)
        await super().set_tls_parameters(parameters)


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
@pytest.mark.parametrize("older", ["client", "server"])
def test_a_card_of_an_earlier_version(version: int, older: str) -> None:
    cards = {role: OlderCard(AUTHORITY) if role == older else EngineCard(AUTHORITY) for role in ("client", "server")}
    for _ in range(2):  # the second time a session is resumed
        parameters = TandemParameters(min_version=version, max_version=version)
        client = Host(TandemConnection("client", parameters, server_name="localhost", server_port=443), cards["client"])
        server = Host(TandemConnection("server", parameters), cards["server"])
        shake(client, server, lambda: 65536)
        assert client.core.state is server.core.state is TandemState.OPEN
        negotiated = (client if older == "client" else server).core.negotiated
        assert negotiated is not None
        assert negotiated.unused is None
    refusing = cards[older]
    assert isinstance(refusing, OlderCard)
    assert refusing.refused == 2
