"""The transport keeps asyncio's promises, and does not hide what the peer or the network does wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable

import pytest

from secfunet.card.errors import CardBusyError
from secfunet.tandem.aio import (
    TandemServer,
    close_writer,
    create_tandem_connection,
    open_tandem_connection,
    start_tandem_server,
)
from secfunet.tandem.parameters import TandemParameters
from secfunet.tandem.transport import TandemTransport
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secfunet.tls.errors import BadRecordMacError, PeerAlertError, TruncatedStreamError
from tests.tandem.conftest import Pools
from tests.tandem.test_both_ends import VERSIONS, Echo, only, port_of


class Log(asyncio.Protocol):
    """Writes down what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.data = bytearray()
        self.arrived = asyncio.Event()
        self.error: Exception | None = None
        self.keep_open = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, TandemTransport)
        self.transport = transport
        self.events.append("made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.data += data
        self.arrived.set()

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")
        self.error = exc
        self.lost.set_result(None)

    async def wait(self, size: int) -> None:
        async with asyncio.timeout(10):
            while len(self.data) < size:
                self.arrived.clear()
                await self.arrived.wait()


class Proxy:
    """A plain TCP hop that can be told to do harm."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.change: Callable[[bytes], bytes] = lambda data: data
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()

    def cut(self) -> None:
        """End both connections in order, as far as TCP knows."""
        for writer in self._writers:
            writer.close()

    def reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, far_writer]

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, to_client: bool) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(self.change(data) if to_client else data)
                    await sink.drain()
            sink.close()

        with contextlib.suppress(OSError):
            await asyncio.gather(pump(reader, far_writer, False), pump(far_reader, writer, True))


@contextlib.asynccontextmanager
async def two(
    pools: Pools, parameters: TandemParameters | None = None, factory: Callable[[], asyncio.BaseProtocol] = Log
) -> AsyncIterator[tuple[Log, asyncio.BaseProtocol, Proxy]]:
    """Two protocols, connected through a proxy: client's, server's."""
    parameters = parameters or TandemParameters()
    made: asyncio.Future[asyncio.BaseProtocol] = asyncio.get_running_loop().create_future()

    def make() -> asyncio.BaseProtocol:
        protocol = factory()
        made.set_result(protocol)
        return protocol

    server: TandemServer
    async with (
        await start_tandem_server(make, pools.server(), host="127.0.0.1", parameters=parameters) as server,
        Proxy(port_of(server)) as proxy,
    ):
        transport, client = await create_tandem_connection(
            Log, pools.client(), "127.0.0.1", proxy.port, server_name="localhost", parameters=parameters, timeout=10
        )
        try:
            yield client, await made, proxy
        finally:
            transport.abort()


@VERSIONS
async def test_orderly_end(pools: Pools, version: int) -> None:
    async with two(pools, only(version)) as (client, server, _):
        assert isinstance(server, Log)
        data = os.urandom(3 << 20)
        client.transport.write(data)
        client.transport.close()
        assert client.transport.is_closing()
        client.transport.write(b"too late")
        await asyncio.wait_for(server.lost, 10)
        await asyncio.wait_for(client.lost, 10)
        assert bytes(server.data) == data
        assert (server.events, server.error) == (["made", "eof", "lost"], None)
        assert client.events[-1] == "lost"
        assert client.error is None


@VERSIONS
async def test_a_cut_is_an_error_and_never_an_eof(pools: Pools, version: int) -> None:
    async with two(pools, only(version)) as (client, server, proxy):
        assert isinstance(server, Log)
        server.transport.write(b"half of it")
        await client.wait(10)
        proxy.cut()
        await asyncio.wait_for(client.lost, 5)
        assert client.events == ["made", "lost"]
        assert isinstance(client.error, TruncatedStreamError)
        assert isinstance(client.error, ConnectionError)
        await asyncio.wait_for(server.lost, 5)
        assert isinstance(server.error, TruncatedStreamError)


async def test_a_reset_is_an_error(pools: Pools) -> None:
    async with two(pools) as (client, _, proxy):
        proxy.reset()
        await asyncio.wait_for(client.lost, 5)
        assert isinstance(client.error, ConnectionError)


@VERSIONS
async def test_a_changed_bit_ends_it_and_the_peer_is_told(pools: Pools, version: int) -> None:
    async with two(pools, only(version)) as (client, server, proxy):
        assert isinstance(server, Log)
        await asyncio.sleep(0.05)  # let the tickets pass
        proxy.change = lambda data: data[:-1] + bytes((data[-1] ^ 1,))
        server.transport.write(b"authentic")
        await asyncio.wait_for(client.lost, 5)
        await asyncio.wait_for(server.lost, 5)
        assert isinstance(client.error, BadRecordMacError)
        assert not client.data
        assert isinstance(server.error, PeerAlertError)
        assert "bad_record_mac" in str(server.error)


async def test_half_close_in_tls13(pools: Pools) -> None:
    async with two(pools, only(TLS_1_3)) as (client, server, _):
        assert isinstance(server, Log)
        server.keep_open = True
        client.transport.write(b"question")
        assert client.transport.can_write_eof()
        client.transport.write_eof()
        with pytest.raises(RuntimeError):
            client.transport.write(b"more")
        await server.wait(8)
        await asyncio.sleep(0.05)
        assert server.events == ["made", "eof"]
        server.transport.write(b"answer")
        await client.wait(6)
        server.transport.close()
        await asyncio.wait_for(client.lost, 5)
        await asyncio.wait_for(server.lost, 5)
        assert (client.error, server.error) == (None, None)


async def test_no_half_close_in_tls12(pools: Pools) -> None:
    async with two(pools, only(TLS_1_2)) as (client, server, _):
        assert isinstance(server, Log)
        server.keep_open = True  # RFC 5246, 7.2.1: it is closed all the same
        assert not client.transport.can_write_eof()
        with pytest.raises(NotImplementedError):
            client.transport.write_eof()
        client.transport.close()
        await asyncio.wait_for(server.lost, 5)


async def test_flow_control(pools: Pools) -> None:
    async with two(pools) as (client, server, _):
        assert isinstance(server, Log)
        server.transport.pause_reading()
        assert not server.transport.is_reading()
        client.transport.set_write_buffer_limits(high=100_000, low=20_000)
        assert client.transport.get_write_buffer_limits() == (20_000, 100_000)
        data = os.urandom(1 << 20) * 24
        client.transport.write(memoryview(data))
        await asyncio.sleep(0.2)
        assert client.events == ["made", "pause"]
        assert client.transport.get_write_buffer_size() > 100_000
        assert not server.data
        server.transport.resume_reading()
        await server.wait(len(data))
        assert bytes(server.data) == data
        await asyncio.sleep(0.02)
        assert client.events == ["made", "pause", "resume"]
        assert client.transport.get_write_buffer_size() == 0


async def test_reading_pauses_between_records(pools: Pools) -> None:
    class Sipping(Log):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(0.001, self.transport.resume_reading)

    async with two(pools, factory=Sipping) as (client, server, _):
        assert isinstance(server, Sipping)
        data = os.urandom(4 << 20)
        client.transport.write(data)
        client.transport.close()
        await asyncio.wait_for(server.lost, 10)
        assert bytes(server.data) == data
        assert server.error is None


async def test_a_buffered_protocol(pools: Pools) -> None:
    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.memory = bytearray(1000)
            self.data = bytearray()
            self.eof = asyncio.get_running_loop().create_future()

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.memory

        def buffer_updated(self, nbytes: int) -> None:
            self.data += self.memory[:nbytes]

        def eof_received(self) -> None:
            self.eof.set_result(None)

    async with two(pools, factory=Buffered) as (client, server, _):
        assert isinstance(server, Buffered)
        data = os.urandom(100_000)
        client.transport.writelines([data[:50], data[50:]])
        client.transport.close()
        await asyncio.wait_for(server.eof, 5)
        assert bytes(server.data) == data


async def test_a_protocols_fault_ends_its_connection_and_is_reported(pools: Pools) -> None:
    class Faulty(Log):
        def data_received(self, data: bytes) -> None:
            raise KeyError("a fault")

    reports: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    async with two(pools, factory=Faulty) as (client, server, _):
        assert isinstance(server, Faulty)
        client.transport.write(b"x")
        await asyncio.wait_for(server.lost, 5)
        assert isinstance(server.error, KeyError)
        await asyncio.wait_for(client.lost, 5)
        assert isinstance(client.error, ConnectionError)
    assert [type(report["exception"]) for report in reports] == [KeyError]


async def test_key_updates_between_two_tandem_ends(pools: Pools) -> None:
    async with two(pools, TandemParameters(record_limit=4)) as (client, server, _):
        assert isinstance(server, Log)
        data = os.urandom(2 << 20)
        client.transport.write(data)
        await server.wait(len(data))
        assert bytes(server.data) == data
        assert server.transport.core.stream.key_updates_received == (128 - 1) // 4
        client.transport.update_key(request_peer=True)
        await asyncio.sleep(0.05)
        assert server.transport.core.stream.key_updates_sent == 1
        server.transport.write(b"under the new key")
        await client.wait(17)


async def test_extra_info(pools: Pools) -> None:
    async with two(pools, only(TLS_1_3, alpn=("x",))) as (client, server, _):
        assert isinstance(server, Log)
        info = client.transport.get_extra_info
        assert info("peercert") == pools.cards.certificates["server-ec"]
        assert info("peer_certificates")[0] == info("peercert")
        assert info("cipher").startswith("TLS_")
        assert (info("tls_version"), info("alpn"), info("resumed")) == (TLS_1_3, "x", info("resumed"))
        assert info("peername")[0] == "127.0.0.1"
        assert info("socket").fileno() >= 0
        assert info("sslcontext") is None
        assert info("nothing", 7) == 7
        assert client.transport.get_protocol() is client
        assert pools.cards.certificates["client-ec"] == server.transport.get_extra_info("peercert")


async def test_one_card_serves_many_in_turn(pools: Pools) -> None:
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as server:

        async def one(index: int) -> None:
            reader, writer = await open_tandem_connection(
                pools.client(), "127.0.0.1", port_of(server), server_name="localhost", timeout=20
            )
            writer.write(b"number %d" % index)
            assert await reader.read(100) == b"NUMBER %d" % index
            await close_writer(writer)

        await asyncio.gather(*(one(index) for index in range(24)))
        assert server.handshakes_done == 24
        assert not server.connections


async def test_a_card_that_stays_busy_is_said_to_be(pools: Pools) -> None:
    pool = pools.client()
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as server:
        async with pool.lease(timeout=5):
            with pytest.raises(CardBusyError):
                await open_tandem_connection(pool, "127.0.0.1", port_of(server), server_name="localhost", timeout=0.5)
        # Free again: and the card of a connection is given back soon, tickets or not.
        for parameters in (only(TLS_1_2), only(TLS_1_3), only(TLS_1_3, resume=False)):
            _, writer = await open_tandem_connection(
                pool, "127.0.0.1", port_of(server), server_name="localhost", parameters=parameters, timeout=5
            )
            async with pool.lease(timeout=0.6):
                pass
            await close_writer(writer)


async def test_closing_the_server(pools: Pools) -> None:
    server = await start_tandem_server(Echo, pools.server(), host="127.0.0.1")
    _, client = await create_tandem_connection(
        Log, pools.client(), "127.0.0.1", port_of(server), server_name="localhost", timeout=5
    )
    client.transport.write(b"x")
    await client.wait(1)  # in TLS 1.3 the server is done behind its client
    server.close()
    server.close_connections()
    await asyncio.wait_for(server.wait_closed(), 5)
    await asyncio.wait_for(client.lost, 5)
    assert client.events == ["made", "eof", "lost"]
    assert not server.connections
