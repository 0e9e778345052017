"""TLS-Tandem between a malicious peer and a broken card: who stalls, lies or leaves keeps nobody else from the card."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from secfunet.card import CardClient, CardGoneError, CardPort, KeyAlgorithm, NegotiatedTls, SingleCard, ready_card
from secfunet.card.instructions import Cla, Ins
from secfunet.errors import SecFuNetError
from secfunet.tandem.aio import TandemServer, close_writer, open_tandem_connection, start_tandem_server
from secfunet.tandem.connection import TandemConnection, TandemState
from secfunet.tandem.errors import HandshakeTimeoutError, PeerStalledError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tandem.transport import CLOSE_TIMEOUT
from secfunet.tls.cipher_suites import SUITES, TLS_1_3
from secfunet.tls.errors import PeerAlertError, TruncatedStreamError
from secfunet.tls.records import ContentType, encode_record, split_records
from secure_element.card_os import CardOs
from tests.support.local_card import USER_PIN, LocalPort, administrator_client, new_store
from tests.support.pki import CertificateAuthority
from tests.tandem.conftest import NAMES
from tests.tandem.engine_card import EngineCard, Host
from tests.tandem.recut import Identities, MemoryPeer, Records, Recut
from tests.tandem.test_both_ends import VERSIONS, Echo, only, port_of

IMPATIENT = TandemParameters(patience=0.4)


def client_hello() -> bytes:
    """A good one, as any program sends it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


class Ends:
    """Cards of a client and of a server in this process, and pools in front of them."""

    def __init__(self, client: CardOs, server: CardOs, authority: CertificateAuthority) -> None:
        self.cards = {"client": client, "server": server}
        self.authority = authority
        self.wrap: Callable[[CardPort], CardPort] = lambda port: port
        self.wrap_server: Callable[[CardPort], CardPort] = lambda port: port
        self.client = SingleCard(lambda: self._connect("client", lambda port: self.wrap(port)))
        self.server = SingleCard(lambda: self._connect("server", lambda port: self.wrap_server(port)))

    async def _connect(self, name: str, wrap: Callable[[CardPort], CardPort]) -> CardClient:
        return await ready_card(wrap(LocalPort(self.cards[name])), pin=USER_PIN, identity=name)

    async def listen(self, parameters: TandemParameters = IMPATIENT) -> TandemServer:
        return await start_tandem_server(
            Echo, self.server, host="127.0.0.1", parameters=parameters, handshake_timeout=20
        )

    async def talk(self, port: int, *, parameters: TandemParameters = IMPATIENT, timeout: float = 5) -> None:
        reader, writer = await open_tandem_connection(
            self.client, "127.0.0.1", port, server_name="localhost", parameters=parameters, timeout=timeout
        )
        try:
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"HELLO"
        finally:
            await close_writer(writer)


@pytest_asyncio.fixture
async def ends(tmp_path: Path) -> AsyncIterator[Ends]:
    authority = CertificateAuthority("CA")
    made = []
    for name in ("client", "server"):
        folder = tmp_path / name
        folder.mkdir()
        card = CardOs(new_store(folder))
        administrator = await administrator_client(card)
        await administrator.generate_key(name, KeyAlgorithm.P_256)
        request = await administrator.certificate_signing_request(name, name)
        certificate = authority.issue_for_request(request, names=NAMES)
        await administrator.load_identity(name, name.encode(), certificate, (authority.der,))
        await administrator.close()
        made.append(card)
    ends = Ends(made[0], made[1], authority)
    yield ends
    await ends.client.close()
    await ends.server.close()


@pytest.mark.parametrize("drips", [False, True], ids=["silent", "dripping"])
async def test_a_client_that_stalls_behind_its_hello_does_not_keep_the_card(ends: Ends, drips: bool) -> None:
    async with await ends.listen() as listener:
        stalled = [await asyncio.open_connection("127.0.0.1", port_of(listener)) for _ in range(3)]

        async def drip(writer: asyncio.StreamWriter) -> None:
            # The head of a record, then its body byte by byte: something always comes, and never enough.
            for byte in encode_record(ContentType.APPLICATION_DATA, bytes(4000)):
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.02)

        dripping = []
        for _, writer in stalled:
            writer.write(client_hello())
            if drips:
                dripping.append(asyncio.create_task(drip(writer)))
        await asyncio.sleep(0.1)
        began = asyncio.get_running_loop().time()
        # The honest client waits for the card behind all three of them.
        await ends.talk(port_of(listener), parameters=TandemParameters(patience=10), timeout=10)
        assert asyncio.get_running_loop().time() - began < 5
        for task in dripping:
            task.cancel()
        for reader, writer in stalled:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
            writer.close()
        assert listener.handshakes_failed == 3


async def test_a_server_that_stalls_does_not_keep_the_card(ends: Ends) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    began = asyncio.get_running_loop().time()
    with pytest.raises(PeerStalledError) as stalled:
        await ends.talk(server.sockets[0].getsockname()[1], timeout=30)
    assert isinstance(stalled.value, HandshakeTimeoutError)
    assert asyncio.get_running_loop().time() - began < 3
    server.close()
    async with await ends.listen() as listener:
        await ends.talk(port_of(listener))


class StoppingPort:
    """A card whose borrower is cancelled during the command of number ``stop``."""

    def __init__(self, port: CardPort, stop: int) -> None:
        self._port = port
        self._stop = stop
        self._borrower = asyncio.current_task()
        self.commands = 0

    async def transmit(self, command: bytes) -> bytes:
        self.commands += 1
        # Tickets are brought, and the card is tidied, by tasks of their own: those are nobody's to cancel.
        if self.commands == self._stop and self._borrower is not None and asyncio.current_task() is self._borrower:
            self._borrower.cancel()
            await asyncio.sleep(10)
        return await self._port.transmit(command)

    async def reset(self, *, cold: bool = False) -> bytes:
        return await self._port.reset(cold=cold)

    async def close(self) -> None:
        await self._port.close()


@VERSIONS
async def test_cancelled_in_any_command(ends: Ends, version: int) -> None:
    """From select and PIN to the last command of the lease: the card is free at once, and works for the next borrower."""
    ports: list[StoppingPort] = []
    stop = 0

    def wrap(port: CardPort) -> CardPort:
        ports.append(StoppingPort(port, stop))
        return ports[-1]

    ends.wrap = wrap
    was_cancelled = 0
    async with await ends.listen(only(version)) as listener:
        await ends.talk(port_of(listener), parameters=only(version))
        await ends.client.close()
        for stop in range(1, ports[0].commands + 1):
            task = asyncio.create_task(ends.talk(port_of(listener), parameters=only(version)))
            await asyncio.gather(task, return_exceptions=True)
            was_cancelled += task.cancelled()
            assert task.cancelled() or task.exception() is None
            stop = 0
            async with asyncio.timeout(5):
                await ends.talk(port_of(listener), parameters=only(version))
                await ends.client.close()
    assert was_cancelled >= 9


class LyingPort:
    """A card that changes what it answers to one command."""

    def __init__(self, port: CardPort, number: int, change: Callable[[bytes], bytes]) -> None:
        self._port = port
        self._number = number
        self._change = change
        self._commands = 0

    async def transmit(self, command: bytes) -> bytes:
        response = await self._port.transmit(command)
        self._commands += 1
        if self._commands == self._number:
            return self._change(response)
        return response

    async def reset(self, *, cold: bool = False) -> bytes:
        return await self._port.reset(cold=cold)

    async def close(self) -> None:
        await self._port.close()


@VERSIONS
async def test_a_card_that_lies(ends: Ends, version: int) -> None:
    """Whatever one answer becomes, the host fails with a documented error or speaks TLS; and it recovers with a good card."""
    chance = random.Random(6101)  # noqa: S311 - noise

    def flipped(response: bytes) -> bytes:
        changed = bytearray(response)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    changes: list[Callable[[bytes], bytes]] = [
        flipped,
        flipped,
        lambda response: response[: len(response) // 2],
        lambda response: response[:-2] + bytes.fromhex("61FF"),
        lambda response: response[:-2] + bytes.fromhex("6700"),
        lambda response: chance.randbytes(len(response)) + bytes.fromhex("9000"),
        lambda response: bytes.fromhex("9000"),
        lambda response: chance.randbytes(65534) + bytes.fromhex("9000"),
    ]
    outcomes = set()
    async with await ends.listen(only(version)) as listener:
        for number in range(1, 16):
            for change in changes:
                ends.wrap = lambda port, number=number, change=change: LyingPort(port, number, change)  # type: ignore[misc]
                try:
                    await ends.talk(port_of(listener), parameters=only(version), timeout=2)
                    outcomes.add("spoke")
                except (SecFuNetError, ConnectionError, asyncio.IncompleteReadError) as error:
                    outcomes.add(type(error).__name__)
                await ends.client.close()
        ends.wrap = lambda port: port
        await ends.talk(port_of(listener), parameters=only(version))
    assert len(outcomes) > 3


async def test_a_card_that_is_gone_in_any_command(ends: Ends) -> None:
    def gone(_: bytes) -> bytes:
        raise CardGoneError("pulled out")

    async with await ends.listen() as listener:
        for number in range(1, 12):
            ends.wrap = lambda port, number=number: LyingPort(port, number, gone)  # type: ignore[misc]
            with contextlib.suppress(CardGoneError):
                await ends.talk(port_of(listener))
            ends.wrap = lambda port: port
            await ends.talk(port_of(listener))
            await ends.client.close()


@pytest.mark.parametrize(("unused", "what"), [(17, "records"), (1 << 20, "records"), (None, "does not say")])
@VERSIONS
async def test_a_card_that_lies_about_what_it_did_not_use(
    ends: Ends, version: int, unused: int | None, what: str
) -> None:
    """More than it was given, half a record, or nothing at all: the host does not go on in the middle of the peer's bytes."""

    class Lying(CardClient):
        async def cipher_suite(self) -> NegotiatedTls:
            return dataclasses.replace(await super().cipher_suite(), unused=unused)

    async def connect() -> CardClient:
        client = await ends._connect("server", lambda port: port)
        return Lying(client.port, segmentation=client.segmentation)

    class LyingCard(SingleCard):
        @contextlib.asynccontextmanager
        async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
            async with super().lease(timeout=timeout) as client:
                yield Lying(client.port, segmentation=client.segmentation)

    ends.server = LyingCard(connect)
    async with await ends.listen(only(version)) as listener:
        with pytest.raises(
            (PeerAlertError, ConnectionError, asyncio.IncompleteReadError), match=r"internal_error|0 bytes"
        ):
            await ends.talk(port_of(listener), parameters=only(version))
        assert listener.handshakes_failed == 1
        assert not listener.connections


class CountingPort:
    """A card that is slow, and counts what it is asked: Process-EAP commands."""

    def __init__(self, port: CardPort, *, seconds: float = 0.0) -> None:
        self._port = port
        self._seconds = seconds
        self.questions = 0

    async def transmit(self, command: bytes) -> bytes:
        if command[:2] == bytes((Cla.EAP, Ins.PROCESS_EAP)):
            self.questions += 1
            await asyncio.sleep(self._seconds)
        return await self._port.transmit(command)

    async def reset(self, *, cold: bool = False) -> bytes:
        return await self._port.reset(cold=cold)

    async def close(self) -> None:
        await self._port.close()


def counting(ends: Ends, *, seconds: float = 0.0) -> list[CountingPort]:
    """Has the server's card count from now on."""
    ports: list[CountingPort] = []

    def wrap(port: CardPort) -> CardPort:
        ports.append(CountingPort(port, seconds=seconds))
        return ports[-1]

    ends.wrap_server = wrap
    return ports


def descriptors() -> int:
    """Open ones of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", ["closed", "reset", "closed behind an alert", "closed behind a flood"])
async def test_clients_that_are_gone_get_no_card(ends: Ends, how: str) -> None:
    """A ClientHello and a close: the next client waits for no answer to them, however many there are."""
    ports = counting(ends)
    async with await ends.listen(TandemParameters()) as listener, ends.server.lease(timeout=5):
        for _ in range(8):
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
            writer.write(client_hello())
            if how == "closed behind an alert":
                writer.write(encode_record(ContentType.ALERT, b"\x02\x5a"))
            if how == "closed behind a flood":
                writer.write(encode_record(ContentType.APPLICATION_DATA, bytes(16000)) * 40)
            if how == "reset":
                await writer.drain()
                await asyncio.sleep(0.01)
                writer.transport.abort()
            writer.close()
        # Nobody had to be given the card to find out.
        await until(lambda: listener.handshakes_failed == 8)
    assert sum(port.questions for port in ports) == 0


async def test_a_client_that_closes_while_the_card_is_at_work_costs_that_answer(ends: Ends) -> None:
    ports = counting(ends, seconds=0.1)
    async with await ends.listen(TandemParameters()) as listener:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        writer.write(client_hello())
        await until(lambda: sum(port.questions for port in ports) == 1)
        writer.close()
        await ends.talk(port_of(listener), parameters=TandemParameters())
        assert listener.handshakes_failed == 1
        assert sum(port.questions for port in ports) == 3


async def test_a_server_that_closes_is_noticed_while_the_card_is_busy(ends: Ends) -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    async with ends.client.lease(timeout=5):
        with pytest.raises(TruncatedStreamError, match="handshake"):
            await ends.talk(server.sockets[0].getsockname()[1], timeout=30)
    server.close()


@VERSIONS
async def test_each_connection_made_is_lost_and_leaves_no_descriptor(ends: Ends, version: int) -> None:
    """Last flight, data and end come while the card is at work: the protocol gets all three, also one that never writes."""
    events: list[str] = []

    class Sink(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            events.append("made")
            assert isinstance(transport, asyncio.ReadTransport)
            transport.pause_reading()
            asyncio.get_running_loop().call_later(0.01, transport.resume_reading)

        def data_received(self, data: bytes) -> None:
            events.append(data.decode())

        def connection_lost(self, exc: Exception | None) -> None:
            events.append(type(exc).__name__)

    counting(ends, seconds=0.02)
    parameters = only(version, resume=False)
    async with await start_tandem_server(Sink, ends.server, host="127.0.0.1", parameters=parameters) as listener:
        before = descriptors()
        for count in range(1, 4):
            await _leave_with_the_last_flight(ends, port_of(listener), parameters)
            wanted = (
                ["made", "data", "TruncatedStreamError"] if version == TLS_1_3 else ["made", "TruncatedStreamError"]
            )
            await until(lambda count=count: events.count("TruncatedStreamError") == count)  # type: ignore[misc]
            assert events[-len(wanted) :] == wanted
        assert not listener.connections
        await until(lambda: descriptors() == before)


async def _leave_with_the_last_flight(ends: Ends, port: int, parameters: TandemParameters) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    host = Host(TandemConnection("client", parameters, server_name="localhost"), EngineCard(ends.authority))
    writer.write(host.work())
    is_tls13 = parameters.min_version == TLS_1_3
    while True:
        host.core.incoming.feed(await reader.read(65536))
        host.core.received()
        answer = host.work()
        if host.core.state is TandemState.OPEN:  # TLS 1.3: what is said last is the client's
            answer += bytes(host.core.stream.seal(b"data"))
        writer.write(answer)
        if answer and (is_tls13 <= (host.core.state is TandemState.OPEN)):
            break
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_drips_records_makes_few_questions(ends: Ends, tmp_path: Path) -> None:
    """Records of one byte, each in a segment of its own: the handshake succeeds, and the card is hardly asked more often than once."""
    ports = counting(ends)
    identities = Identities(tmp_path, ends.authority)
    suite = SUITES[0x1301]
    async with await ends.listen(only(TLS_1_3, suites=(suite.number,))) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        peer = MemoryPeer(identities.context("client", "p256"), "client")
        writer.write(peer.step())
        while not peer.is_through:
            out = peer.step(await reader.read(65536))
        clear, flight = Recut(peer, suite).tls13(out, Records([1], [0]))
        records = split_records(clear + flight)
        assert len(records) > 500
        for record in records:
            writer.write(record.raw)
            await asyncio.sleep(0.0005)
        writer.write(peer.send(b"drop by drop"))
        got = b""
        while not got:
            got = peer.read(await reader.read(65536))
        assert got == b"DROP BY DROP"
        writer.close()
    assert sum(port.questions for port in ports) < 25


async def test_a_close_behind_the_peers_end_does_not_wait_for_it(ends: Ends) -> None:
    """The peer left while the card was at work; the protocol does not read, and closes: the socket goes at once, not seconds later."""
    made: list[asyncio.Transport] = []

    class Paused(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()
            made.append(transport)

    counting(ends, seconds=0.02)
    parameters = only(TLS_1_3, resume=False)
    async with await start_tandem_server(Paused, ends.server, host="127.0.0.1", parameters=parameters) as listener:
        await _leave_with_the_last_flight(ends, port_of(listener), parameters)
        await until(lambda: bool(made))
        await asyncio.sleep(0.05)
        assert listener.connections, "its data waits to be read"
        made[0].close()
        async with asyncio.timeout(CLOSE_TIMEOUT / 2):
            while listener.connections:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("moment", ["handshake", "open"])
async def test_an_alert_is_not_reset_away_by_what_the_peer_still_sends(ends: Ends, tmp_path: Path, moment: str) -> None:
    """A peer that looks for an answer only when it has sent everything finds the alert, and an orderly end behind it."""
    peer = MemoryPeer(Identities(tmp_path, ends.authority, kinds=("p256",)).context("client", "p256"), "client")
    async with await ends.listen(only(TLS_1_3, suites=(0x1301,))) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        if moment == "open":
            writer.write(peer.step())
            while not peer.is_through:
                writer.write(peer.step(await reader.read(65536)))
            await until(lambda: len(listener.connections) == 1)
        writer.write(encode_record(ContentType.HANDSHAKE, bytes(100)) + bytes(600_000))
        await writer.drain()
        for _ in range(3):
            await asyncio.sleep(0.05)
            writer.write(bytes(100_000))
            await writer.drain()
        heard = split_records(await reader.read())
        # In an open connection tickets come first, and the alert is encrypted.
        assert heard[-1].kind == (ContentType.ALERT if moment == "handshake" else ContentType.APPLICATION_DATA)
        assert heard[-1].length == (2 if moment == "handshake" else 2 + 1 + 16)
        writer.close()
        await until(lambda: not listener.connections)


class Talker(asyncio.Protocol):
    """Says much at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(bytes(6_000_000))


async def test_an_alert_behind_much_data_is_not_reset_away(ends: Ends, tmp_path: Path) -> None:
    """What was written before the alert fills the socket; when the peer has read it, it is not closed before the peer's end."""
    peer = MemoryPeer(Identities(tmp_path, ends.authority, kinds=("p256",)).context("client", "p256"), "client")
    parameters = only(TLS_1_3, suites=(0x1301,))
    async with await start_tandem_server(Talker, ends.server, host="127.0.0.1", parameters=parameters) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener), limit=1000)
        writer.write(peer.step())
        while not peer.is_through:
            writer.write(peer.step(await reader.read(65536)))
        await until(lambda: len(listener.connections) == 1)
        await asyncio.sleep(0.1)
        writer.write(encode_record(ContentType.HANDSHAKE, bytes(100)))
        await asyncio.sleep(0.1)
        heard = bytearray()
        while data := await asyncio.wait_for(reader.read(65536), 5):
            heard += data
            if len(heard) % 7 == 0:
                writer.write(bytes(1000))
        assert len(heard) > 500_000
        assert split_records(bytes(heard))[-1].length == 2 + 1 + 16
        writer.write(bytes(1000))
        await asyncio.sleep(0.05)
        writer.write(bytes(1000))
        await asyncio.sleep(0.05)
        assert not writer.transport.is_closing()
        writer.close()
        await until(lambda: not listener.connections)


async def test_a_peer_that_never_ends_is_dropped_behind_our_alert(ends: Ends) -> None:
    """Neither by silence nor by sending on does it keep the socket for long."""
    async with await ends.listen() as listener:
        for flood in (b"", bytes(65536)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
            writer.write(encode_record(ContentType.HANDSHAKE, bytes(100)))
            assert split_records(await reader.read())[-1].kind == ContentType.ALERT
            began = asyncio.get_running_loop().time()
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(2 * CLOSE_TIMEOUT):
                    while not writer.transport.is_closing():
                        writer.write(flood or b"x")
                        await writer.drain()
                        await asyncio.sleep(0 if flood else 0.05)
            took = asyncio.get_running_loop().time() - began
            assert took < (CLOSE_TIMEOUT / 2 if flood else 1.9 * CLOSE_TIMEOUT)
            writer.close()
