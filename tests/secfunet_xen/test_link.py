"""Both ends of a channel in memory, with real Unix sockets at either side."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from secfunet.xen.errors import VchanError
from secfunet.xen.guest_end import GuestEnd
from secfunet.xen.host_end import HostEnd
from secfunet.xen.link import Link
from tests.secfunet_xen.memory import MemoryChannel


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    yield path
    shutil.rmtree(path)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    writer.close()


@contextlib.asynccontextmanager
async def echo_service(path: Path) -> AsyncIterator[None]:
    server = await asyncio.start_unix_server(echo, path)
    try:
        yield
    finally:
        server.close()


class Xen:
    """Hands the two ends of fresh channels to a host's and a guest's end, as libxenvchan's rendezvous does."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[MemoryChannel] = asyncio.Queue()
        self.made: list[MemoryChannel] = []

    async def make(self) -> MemoryChannel:
        host, guest = MemoryChannel.pair()
        self.made.append(host)
        self.waiting.put_nowait(guest)
        return host

    async def connect(self) -> MemoryChannel:
        if self.waiting.empty():
            raise VchanError("no channel")
        return self.waiting.get_nowait()


async def until(condition: object, timeout: float = 10) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def joined(folder: Path, xen: Xen) -> AsyncIterator[tuple[HostEnd, GuestEnd]]:
    services = {"agent": folder / "host-agent"}
    host = HostEnd(xen.make, services, "web")  # type: ignore[arg-type]
    await host.start()
    async with echo_service(services["agent"]), GuestEnd(folder, ("agent", "enrol"), connect=xen.connect) as guest:
        await until(lambda: guest.alive)
        yield host, guest
    await host.close()


async def test_what_goes_in_comes_back_whole(folder: Path) -> None:
    async with joined(folder, Xen()) as (_, guest):
        reader, writer = await asyncio.open_unix_connection(guest.socket("agent"))
        data = secrets.token_bytes(3_000_000)

        async def send() -> None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()

        async with asyncio.timeout(30):
            _, came = await asyncio.gather(send(), reader.read(-1))
        assert came == data
        writer.close()


async def test_a_stream_that_nobody_reads_stops_no_other(folder: Path) -> None:
    async with joined(folder, Xen()) as (_, guest):
        slow_reader, slow = await asyncio.open_unix_connection(guest.socket("agent"), limit=1024)
        slow.write(secrets.token_bytes(4_000_000))
        await asyncio.sleep(0.2)
        for _ in range(20):
            reader, writer = await asyncio.open_unix_connection(guest.socket("agent"))
            writer.write(b"ping")
            async with asyncio.timeout(5):
                assert await reader.readexactly(4) == b"ping"
            writer.close()
        assert not slow_reader.at_eof()
        slow.transport.abort()


async def test_a_service_that_is_not_there_is_refused(folder: Path) -> None:
    async with joined(folder, Xen()) as (_, guest):
        reader, writer = await asyncio.open_unix_connection(guest.socket("enrol"))
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_without_a_channel_is_closed_at_once(folder: Path) -> None:
    async def connect() -> MemoryChannel:
        raise VchanError("nothing there")

    async with GuestEnd(folder, ("agent",), connect=connect) as guest:
        reader, writer = await asyncio.open_unix_connection(guest.socket("agent"))
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_a_channel_that_broke_is_made_again(folder: Path) -> None:
    xen = Xen()
    async with joined(folder, xen) as (_, guest):
        reader, writer = await asyncio.open_unix_connection(guest.socket("agent"))
        await xen.made[0].close()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: guest.alive)
        reader, writer = await asyncio.open_unix_connection(guest.socket("agent"))
        writer.write(b"again")
        async with asyncio.timeout(5):
            assert await reader.readexactly(5) == b"again"
        writer.close()
    assert len(xen.made) == 2


async def test_the_guest_closes_first_when_it_is_told_to(folder: Path) -> None:
    xen = Xen()
    async with joined(folder, xen) as (host, guest):
        async with asyncio.timeout(5):
            await host.close(grace=4)
        await until(lambda: not guest.alive)
        assert xen.made[0].closed


async def test_a_peer_that_is_silently_gone_is_noticed() -> None:
    host, guest = MemoryChannel.pair()
    link = Link(guest, ping_interval=0.05, dead_after=0.3)
    other = Link(host, services={}, ping_interval=0.05, dead_after=5)
    task = asyncio.create_task(other.run())
    alive = asyncio.create_task(link.run())
    await until(lambda: link.alive)
    await asyncio.sleep(0.5)
    assert link.alive  # pings are answered
    host.silent = True
    async with asyncio.timeout(5):
        assert "no sign of life" in await alive
    assert (guest.abandoned, guest.closed) == (True, False)  # a guest must not close what its migration left open
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_dom0_closes_the_channel_of_a_guest_that_is_silently_gone() -> None:
    host, guest = MemoryChannel.pair()
    link = Link(host, services={}, ping_interval=0.05, dead_after=0.3)
    guest.silent = True
    async with asyncio.timeout(5):
        assert "no sign of life" in await link.run()
    assert (host.abandoned, host.closed) == (False, True)


@pytest.mark.parametrize("garbage", [b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_guest_that_sends_garbage_loses_its_channel(garbage: bytes) -> None:
    host, guest = MemoryChannel.pair()
    link = Link(host, services={})
    task = asyncio.create_task(link.run())
    await guest.write(garbage)
    async with asyncio.timeout(5):
        assert "protocol" in (why := await task) or "header" in why
    assert guest.closed
