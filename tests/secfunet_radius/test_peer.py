"""A card and whoever answers in a RADIUS server's place: accepts that are none, packets that do not fit, networks that lose them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from gose.radius.packets import Reply, encode_reply, parse_request
from secfunet.card import CardClient, KeyAlgorithm
from secfunet.card.parameters import TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.radius.access import AccessAnswer, AccessClient, AccessRequest
from secfunet.radius.errors import (
    KeysDifferError,
    PeerRefusedError,
    RadiusError,
    RadiusFormatError,
    RadiusRejectedError,
    RadiusSilenceError,
)
from secfunet.radius.peer import MAX_ROUNDS, Authenticated, authenticate
from secfunet.radius.udp import RadiusPort, radius_port
from secfunet.radius.wire import Code
from secure_element.card_os import CardOs
from secure_element.eap_engine import EapEngine, TlsIdView
from tests.secure_element_tls.cards import engine
from tests.support.local_card import new_store, personalised, ready_client
from tests.support.pki import CertificateAuthority

SECRET = b"a secret of thirty-two bytes, ok"
CA = CertificateAuthority()
Change = Callable[[Reply], Reply | None]


class Server:
    """A RADIUS server around a server card's engine; ``change`` bends its replies."""

    def __init__(self, change: Change = lambda reply: reply) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        identity = TlsIdView("radius", b"radius", CA.issue(key.public_key(), "radius"), (CA.certificate,), key)
        self.engine: EapEngine = engine(identity, TlsParameters(role="server"))
        self.change = change
        self.requests = 0

    def answer(self, untrusted: bytes) -> bytes | None:
        request = parse_request(untrusted, SECRET)
        self.requests += 1
        out = self.engine.process(request.eap)
        packet = EapPacket.decode(out)
        reply = Reply(Code.ACCESS_CHALLENGE, out, b"state")
        if packet.code is EapCode.SUCCESS:
            reply = Reply(Code.ACCESS_ACCEPT, out, msk=self.engine.session_key()[:64])
        elif packet.code is EapCode.FAILURE:
            reply = Reply(Code.ACCESS_REJECT, out)
        bent = self.change(reply)
        return None if bent is None else encode_reply(request, bent)

    async def exchange(self, request: AccessRequest) -> AccessAnswer:
        raw = self.answer(request.encoded)
        if raw is None:
            raise RadiusSilenceError("nothing")
        return request.answer(raw)


@pytest.fixture
async def card(tmp_path: Path) -> CardOs:
    return await personalised(new_store(tmp_path), CA, ("alice", KeyAlgorithm.P_256))


async def run(card: CardOs, exchange: Callable[[AccessRequest], Awaitable[AccessAnswer]]) -> Authenticated:
    client: CardClient = await ready_client(card, "alice")
    access = AccessClient(SECRET, nas="here", mtu=1400)
    return await authenticate(client, access, exchange, unix_time=int(time.time()))


async def still_good(card: CardOs) -> None:
    assert (await run(card, Server().exchange)).identity == "alice"


async def test_a_sound_server(card: CardOs) -> None:
    server = Server()
    done = await run(card, server.exchange)
    assert done.rounds == server.requests
    assert x509.load_der_x509_certificate(done.server_certificate).subject.rfc4514_string() == "CN=radius"


def accepts(**how: Any) -> Change:
    def change(reply: Reply) -> Reply:
        return dataclasses.replace(reply, **how) if reply.code is Code.ACCESS_ACCEPT else reply

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (accepts(msk=bytes(64)), KeysDifferError),
        (accepts(msk=None), KeysDifferError),
        (accepts(eap=b""), RadiusFormatError),
        (accepts(eap=EapPacket(EapCode.FAILURE, 1).encode()), RadiusFormatError),
    ],
)
async def test_an_accept_that_is_none(card: CardOs, change: Change, error: type[RadiusError]) -> None:
    with pytest.raises(error):
        await run(card, Server(change).exchange)
    await still_good(card)


@pytest.mark.parametrize("after", [1, 2, 3])
async def test_an_accept_before_the_card_has_finished(card: CardOs, after: int) -> None:
    """Somebody who has the secret and no certificate lets everybody in: the card does not agree."""
    count = 0

    def early(reply: Reply) -> Reply:
        nonlocal count
        count += 1
        success = EapPacket(EapCode.SUCCESS, EapPacket.decode(reply.eap).identifier).encode()
        return reply if count < after else Reply(Code.ACCESS_ACCEPT, success, msk=bytes(64))

    with pytest.raises(PeerRefusedError):
        await run(card, Server(early).exchange)
    await still_good(card)


@pytest.mark.parametrize(
    "eap",
    [
        b"",
        b"x",
        EapPacket(EapCode.REQUEST, 1, EapType.TLS, b"").encode(),
        EapPacket(EapCode.RESPONSE, 1, EapType.TLS, b"\0").encode(),
        EapPacket(EapCode.REQUEST, 1, EapType.TLS, b"\x80\0\0\0\x05junk!").encode(),
        EapPacket(EapCode.SUCCESS, 1).encode(),
        EapPacket(EapCode.FAILURE, 1).encode(),
    ],
)
@pytest.mark.parametrize("after", [1, 2])
async def test_challenges_that_do_not_fit(card: CardOs, eap: bytes, after: int) -> None:
    count = 0

    def bend(reply: Reply) -> Reply:
        nonlocal count
        count += 1
        return reply if count < after else Reply(Code.ACCESS_CHALLENGE, eap, b"state")

    with pytest.raises(RadiusError):
        await run(card, Server(bend).exchange)
    await still_good(card)


async def test_a_server_that_never_comes_to_an_end(card: CardOs) -> None:
    notification = EapPacket(EapCode.REQUEST, 1, EapType.NOTIFICATION, b"wait").encode()
    server = Server()
    sent = 0

    async def forever(request: AccessRequest) -> AccessAnswer:
        nonlocal sent
        sent += 1
        return AccessAnswer(Code.ACCESS_CHALLENGE, notification, b"state")

    with pytest.raises(RadiusError, match="not over"):
        await run(card, forever)
    assert sent == MAX_ROUNDS
    assert server.requests == 0
    await still_good(card)


async def test_a_reject_at_any_moment_is_the_servers(card: CardOs) -> None:
    for after in (1, 2, 3):
        count = 0

        def refuse(reply: Reply, after: int = after) -> Reply:
            nonlocal count
            count += 1
            failure = EapPacket(EapCode.FAILURE, 1).encode()
            return reply if count < after else Reply(Code.ACCESS_REJECT, failure)

        with pytest.raises(RadiusRejectedError):
            await run(card, Server(refuse).exchange)
    await still_good(card)


class Network(asyncio.DatagramProtocol):
    """A server's socket: ``lost`` of each packet, either way, are dropped before one arrives; answers come twice, with noise before."""

    def __init__(self, server: Server, lost: int) -> None:
        self.server = server
        self.lost = lost
        self.seen: dict[bytes, int] = {}
        self.answers: dict[bytes, bytes] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        count = self.seen[data] = self.seen.get(data, 0) + 1
        if count <= self.lost:
            return
        if data not in self.answers:  # a repetition gets the same answer, as RFC 5080 has it
            self.answers[data] = self.server.answer(data) or b""
        if count <= 2 * self.lost:
            return
        answer = self.answers[data]
        for noise in (b"", b"noise", answer[:-1] + bytes((answer[-1] ^ 1,)), bytes(4096)):
            self.transport.sendto(noise, addr)
        self.transport.sendto(answer, addr)
        self.transport.sendto(answer, addr)


@contextlib.asynccontextmanager
async def network(server: Server, lost: int) -> AsyncIterator[int]:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Network(server, lost), local_addr=("127.0.0.1", 0)
    )
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


async def test_packets_that_are_lost_doubled_and_forged(card: CardOs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secfunet.radius.udp.FIRST_WAIT", 0.05)
    for lost in (0, 1):
        server = Server()
        async with network(server, lost) as number, radius_port("127.0.0.1", number, patience=20) as port:
            done = await run(card, port.exchange)
        assert done.rounds == server.requests  # each request reached the server's card once


async def test_a_flood_does_not_fill_memory_and_silence_ends() -> None:
    port = RadiusPort(0.3)
    for _ in range(10_000):
        port.datagram_received(bytes(4096), None)
    assert port._arrived.qsize() <= 64
    server = Server(lambda reply: None)
    async with network(server, 99) as number, radius_port("127.0.0.1", number, patience=0.3) as quiet:
        with pytest.raises(RadiusSilenceError):
            await quiet.exchange(AccessClient(SECRET, nas="here", mtu=1400).request("alice", b"x", None))
