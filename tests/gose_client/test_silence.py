"""The other side is there no longer, and nothing says so: no reset, no end, no answer. It heals within the caller's time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator

import pytest

from tests.gose_client.conftest import Host
from tests.gose_client.test_healing import sign

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]

SO_ATTACH_FILTER = 26  # asm-generic/socket.h


def drop_all(connection: socket.socket) -> None:
    """From now on the kernel throws away every segment that comes for this socket, before TCP sees it: nothing is acknowledged, as if
    the machine had lost its power. (A classic BPF program of one instruction, "return 0"; socket(7).)
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))


class Wire:
    """Between a client and one port of the grid. It can be cut off from its client, or stop carrying, without closing anything."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._generation = 0
        self._near: list[socket.socket] = []
        self._streams: list[asyncio.StreamWriter] = []
        self.connections = 0
        self.port = 0

    def cut(self) -> None:
        """What is connected now is heard no longer; who connects anew is."""
        for connection in self._near:
            drop_all(connection)

    def stall(self) -> None:
        """What is connected now is acknowledged (by the kernel), and led nowhere; who connects anew is served."""
        self._generation += 1

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        generation = self._generation
        self._near.append(writer.get_extra_info("socket")._sock)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._streams += [writer, far_writer]

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while piece := await source.read(65536):
                    if generation != self._generation:
                        await asyncio.Event().wait()  # until the test ends
                    sink.write(piece)
                    await sink.drain()
                sink.close()

        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


@contextlib.asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    carrier = Wire(port)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.get_running_loop().create_task(carrier.carry(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    carrier.port = server.sockets[0].getsockname()[1]
    try:
        yield carrier
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for stream in carrier._streams:
            stream.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_grid_whose_machine_is_gone_in_the_middle_of_a_stream(host: Host) -> None:
    """TCP_USER_TIMEOUT: what is not acknowledged for so long ends the connection."""
    async with (
        host.grid.running(),
        wire(host.grid.settings.service_provider.grpc.port) as between,
        host.client(operations=f"localhost:{between.port}", dead_peer_timeout=1.0) as client,
    ):
        session = await host.session(client)
        await sign(host, client, session)
        assert between.connections == 1
        between.cut()
        begun = time.monotonic()
        await asyncio.gather(*(sign(host, client, session, timeout=20) for _ in range(3)))
        assert 0.5 < time.monotonic() - begun < 8
        assert between.connections == 2
        assert session._generation == 0, "a dead connection needs no login"


async def test_a_card_that_takes_longer_than_the_grid_waits(host: Host) -> None:
    """The grid's bound for a batch is not the caller's time: the retry joins what is in work, and nothing is executed twice."""
    card = host.grid.cards["se-vm-1"].process
    assert card is not None
    async with host.grid.running(batch_timeout=0.3, operation_timeout=10.0) as service, host.client() as client:
        session = await host.session(client)
        await sign(host, client, session)
        slot = next(slot for slot in service.rack.slots() if slot.seid == "se-vm-1")
        done = slot.jobs_done
        card.send_signal(signal.SIGSTOP)
        try:
            waiting = asyncio.create_task(sign(host, client, session, timeout=20))
            await asyncio.sleep(1.5)
            assert not waiting.done()
        finally:
            card.send_signal(signal.SIGCONT)
        await waiting
        assert slot.jobs_done - done == 1


async def test_an_idle_connection_to_a_machine_that_is_gone(host: Host) -> None:
    """Keep-alive finds out before anybody needs the connection."""
    async with (
        host.grid.running(),
        wire(host.grid.settings.service_provider.grpc.port) as between,
        host.client(operations=f"localhost:{between.port}", dead_peer_timeout=1.0) as client,
    ):
        session = await host.session(client)
        await sign(host, client, session)
        between.cut()
        await asyncio.sleep(4)
        begun = time.monotonic()
        await sign(host, client, session, timeout=20)
        assert time.monotonic() - begun < 2
        assert between.connections >= 2


async def test_a_stream_that_leads_nowhere(host: Host) -> None:
    """Something on the way acknowledges all and delivers nothing: the stream is given up, and its connection with it."""
    async with (
        host.grid.running(),
        wire(host.grid.settings.service_provider.grpc.port) as between,
        host.client(operations=f"localhost:{between.port}", stall_timeout=1.0) as client,
    ):
        session = await host.session(client)
        await sign(host, client, session)
        between.stall()
        begun = time.monotonic()
        await sign(host, client, session, timeout=20)
        assert 0.9 < time.monotonic() - begun < 6
        assert between.connections == 2


async def test_a_login_that_leads_nowhere(host: Host) -> None:
    """The provider's endpoint is silent in the middle of a login: another connection, within the caller's time."""
    async with (
        host.grid.running(),
        wire(host.grid.settings.openid_provider.endpoint.port) as between,
        host.client(answer_timeout=1.0) as client,
    ):
        # The grid's URLs have the endpoint's own port, so only the way there is another one.
        http = client._http

        async def through() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            context = host.grid.browser(None)._context
            return await asyncio.open_connection("127.0.0.1", between.port, ssl=context, server_hostname="localhost")

        http._connectors[host.grid.op] = through
        await host.session(client)
        between.stall()
        client._logins.forget()
        begun = time.monotonic()
        await host.session(client, timeout=20)
        assert 0.9 < time.monotonic() - begun < 6
        assert between.connections == 2
