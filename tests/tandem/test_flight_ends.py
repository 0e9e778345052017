"""Never a record too many for the card, never one withheld: any join and cut of the peer's messages, any data behind them.

The card's engine is the real one, the peer is Python's ssl module; docking host and card are in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secfunet.apdu import status_error
from secfunet.card.parameters import TlsParameters
from secfunet.tandem.connection import TandemConnection, TandemState
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.records import ContentType, split_records
from tests.support.pki import CertificateAuthority
from tests.tandem.engine_card import EngineCard, Host, run
from tests.tandem.recut import KINDS, Identities, MemoryPeer, Records, Recut

AUTHORITY = CertificateAuthority()
SUITES_13 = (0x1301, 0x1302, 0x1303)
SUITES_12 = (0xC02B, 0xC02C, 0xCCA9, 0xC009)
RSA_SUITES_12 = (0xC02F, 0xC030, 0xCCA8, 0xC013, 0x009C)
LENGTHS = (0, 1, 2, 35, 36, 37, 52, 72, 76, 77, 78, 79, 80, 108, 110, 112, 122, 142, 145, 147, 264, 392, 520)
"""Of data: as long as a Finished, a CertificateVerify, an alert, and their neighbours."""

sizes = st.lists(st.one_of(st.sampled_from(LENGTHS), st.integers(0, 5000)), max_size=12)
cuts = st.builds(
    Records,
    st.one_of(
        st.just([16000]), st.just([1]), st.lists(st.sampled_from([1, 2, 20, 36, 52, 78, 500, 1000, 5000]), min_size=1)
    ),
    st.one_of(st.just([0]), st.lists(st.integers(0, 300), min_size=1, max_size=4)),
)
coarse = st.builds(Records, st.lists(st.sampled_from([20, 36, 500, 16000]), min_size=1), st.just([0]))
CUTS = {"reports": cuts, "old": coarse}
"""A card that does not report is asked about each record: not a hundred of them here."""
segments = st.one_of(st.just([1 << 20]), st.lists(st.integers(1, 4000), min_size=1, max_size=6))
WHOLE = itertools.repeat(1 << 20)
relaxed = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class OldCard(EngineCard):
    """A card of an earlier version: it does not report, and refuses what it does not know."""

    async def set_tls_parameters(self, parameters: TlsParameters) -> None:
        if parameters.report or parameters.server_port:
            raise status_error(0x6A80, 0x82)
        await super().set_tls_parameters(parameters)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return Identities(tmp_path_factory.mktemp("peers"), AUTHORITY)


CARDS = {
    "reports": (EngineCard(AUTHORITY), EngineCard(AUTHORITY)),
    "old": (OldCard(AUTHORITY), OldCard(AUTHORITY)),
}


def feed(host: Host, data: bytes, pieces: Iterable[int]) -> bytes:
    """Bytes come in, in segments; the core is told of each, and does what it wants of the card. Return what it sends."""
    sent, offset = b"", 0
    for size in pieces:
        if offset >= len(data):
            break
        piece = data[offset : offset + size]
        offset += len(piece)
        while piece:
            piece = piece[host.core.incoming.feed(piece) :]
            if host.core.state is not TandemState.OPEN:
                host.core.received()
                sent += host.work()
            elif piece:
                raise AssertionError("the buffer is full")
    return sent


def parameters(data: st.DataObject, version: int, suites: tuple[int, ...]) -> TandemParameters:
    # A group that the peer has no key share for makes a HelloRetryRequest.
    groups = data.draw(st.sampled_from([(), (0x0018,)]), label="groups")
    return TandemParameters(min_version=version, max_version=version, suites=suites, groups=groups)


def read_all(host: Host, data: bytes) -> None:
    got = b""
    while piece := host.core.stream.receive():
        got += piece
    assert got == data


def has(flight: bytes, kind: ContentType) -> bool:
    return any(record.kind == kind for record in split_records(flight))


def check(host: Host, flight: bytes, records: bytes, sent: bytes, data: st.DataObject) -> bytes:
    """The peer's last flight and its data come in; return what the host sends."""
    pieces = itertools.cycle(data.draw(segments))
    if data.draw(st.booleans(), label="the data comes later"):
        answer = feed(host, flight, pieces)
        assert host.core.state is TandemState.OPEN, "nothing is waited for behind the Finished"
        feed(host, records, pieces)
    else:
        answer = feed(host, flight + records, pieces)
    assert host.core.state is TandemState.OPEN
    read_all(host, sent)
    return answer


@pytest.mark.parametrize("cards", CARDS)
@relaxed
@given(st.data())
def test_a_server_card_of_tls13(identities: Identities, cards: str, data: st.DataObject) -> None:
    kind, suite = data.draw(st.sampled_from(KINDS)), SUITES[data.draw(st.sampled_from(SUITES_13))]
    chosen = parameters(data, TLS_1_3, (suite.number,))
    context = identities.context("client", kind)
    session = None
    for _ in range(data.draw(st.integers(1, 2), label="connections")):
        host = Host(TandemConnection("server", chosen), CARDS[cards][1])
        peer = MemoryPeer(context, "client", session)
        out = peer.step()
        while not peer.is_through:
            out = peer.step(feed(host, out, WHOLE))
        recut = Recut(peer, suite)
        clear, flight = recut.tls13(out, data.draw(CUTS[cards]))
        records, sent = recut.data13(data.draw(sizes))
        tickets = check(host, clear + flight, records, sent, data)
        assert peer.read(tickets + bytes(host.core.stream.seal(b"answer"))) == b"answer"
        session = peer.tls.session


@pytest.mark.parametrize("cards", CARDS)
@relaxed
@given(st.data())
def test_a_client_card_of_tls13(identities: Identities, cards: str, data: st.DataObject) -> None:
    """A server may send data right behind its Finished, before ours (RFC 8446, 4.4.4)."""
    kind, suite = data.draw(st.sampled_from(KINDS)), SUITES[data.draw(st.sampled_from(SUITES_13))]
    chosen = TandemParameters(min_version=TLS_1_3, max_version=TLS_1_3, suites=(suite.number,))
    context = identities.context("server", kind)
    if data.draw(st.booleans(), label="retry"):
        context.set_ecdh_curve("secp384r1")
    for is_last in (False, True) if data.draw(st.booleans(), label="resumed") else (True,):
        host = Host(TandemConnection("client", chosen, server_name="localhost"), CARDS[cards][0])
        peer = MemoryPeer(context, "server")
        flight = peer.step(host.work())
        while not has(flight, ContentType.APPLICATION_DATA):
            flight = peer.step(feed(host, flight, WHOLE))
        recut = Recut(peer, suite)
        clear, flight = recut.tls13(flight, data.draw(CUTS[cards]))
        records, sent = recut.data13(data.draw(sizes) if is_last else [])
        tickets = peer.step(check(host, clear + flight, records, sent, data))
        assert peer.is_through
        assert peer.read(bytes(host.core.stream.seal(b"question"))) == b"question"
        if not is_last:
            host.core.incoming.feed(tickets)
            assert not host.core.stream.receive()
            run(host.link.bring_tickets(host.core.stream.take_tickets()))


@pytest.mark.parametrize("cards", CARDS)
@relaxed
@given(st.data())
def test_a_server_card_of_tls12(identities: Identities, cards: str, data: st.DataObject) -> None:
    kind, suite = data.draw(st.sampled_from(KINDS)), SUITES[data.draw(st.sampled_from(SUITES_12))]
    chosen = TandemParameters(
        min_version=TLS_1_2, max_version=TLS_1_2, suites=(suite.number,), allow_legacy=suite.is_legacy
    )
    context = identities.context("client", kind)
    session = None
    for _ in range(data.draw(st.integers(1, 2), label="connections")):
        host = Host(TandemConnection("server", chosen), CARDS[cards][1])
        peer = MemoryPeer(context, "client", session)
        hello = feed(host, peer.step(), WHOLE)
        recut, how = Recut(peer, suite), data.draw(CUTS[cards])
        flight = recut.clear12(peer.step(hello), how)
        flight, records, sent = recut.finished12(flight, hello, how, data.draw(sizes))
        answer = check(host, flight, records, sent, data)
        assert not peer.step(answer)
        assert peer.is_through
        assert peer.read(bytes(host.core.stream.seal(b"answer"))) == b"answer"
        session = peer.tls.session


@pytest.mark.parametrize("cards", CARDS)
@relaxed
@given(st.data())
def test_a_client_card_of_tls12(identities: Identities, cards: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    suite = SUITES[data.draw(st.sampled_from(RSA_SUITES_12 if kind.startswith("rsa") else SUITES_12))]
    chosen = TandemParameters(
        min_version=TLS_1_2, max_version=TLS_1_2, suites=(suite.number,), allow_legacy=suite.is_legacy
    )
    context = identities.context("server", kind)
    for _ in range(data.draw(st.integers(1, 2), label="connections")):
        host = Host(TandemConnection("client", chosen, server_name="localhost"), CARDS[cards][0])
        peer = MemoryPeer(context, "server")
        recut, how = Recut(peer, suite), data.draw(CUTS[cards])
        hello = flight = peer.step(host.work())
        if not has(flight, ContentType.CHANGE_CIPHER_SPEC):
            # A full handshake: the flight with the Finished is the second one.
            flight = peer.step(feed(host, recut.clear12(flight, how), [*data.draw(segments), 1 << 20]))
        flight, records, sent = recut.finished12(recut.clear12(flight, how), hello, how, data.draw(sizes))
        peer.step(check(host, flight, records, sent, data))
        assert peer.is_through
        assert peer.read(bytes(host.core.stream.seal(b"question"))) == b"question"


def test_the_card_overlooks_hello_requests_in_the_handshake(identities: Identities) -> None:
    def between(content: bytes) -> bytes:
        changed, offset = b"\0\0\0\0", 0
        while offset < len(content):
            end = offset + 4 + int.from_bytes(content[offset + 1 : offset + 4])
            changed += content[offset:end] + b"\0\0\0\0"
            offset = end
        return changed

    suite = SUITES[0xC02B]
    chosen = TandemParameters(min_version=TLS_1_2, max_version=TLS_1_2, suites=(suite.number,))
    # Among these some cut the last of them, behind the end of the flight, in two.
    for size in (1, *range(48, 60), 16000):
        host = Host(TandemConnection("client", chosen, server_name="localhost"), EngineCard(AUTHORITY))
        peer = MemoryPeer(identities.context("server", "p256"), "server")
        recut, out = Recut(peer, suite, change=between), host.work()
        while host.core.state is not TandemState.OPEN:
            out = feed(host, recut.clear12(peer.step(out), Records([size], [0])), WHOLE)
        assert peer.read(out + bytes(host.core.stream.seal(b"question"))) == b"question"
