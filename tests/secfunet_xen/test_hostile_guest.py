"""A guest that writes as fast as dom0 reads: what it gets of dom0's event loop, tasks, sockets, memory, pages and log."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from secfunet.xen import vchan
from secfunet.xen.budget import (
    BYTES_AT_ONCE,
    BYTES_PER_SECOND,
    FRAMES_A_TURN,
    FRAMES_AT_ONCE,
    FRAMES_OF_AN_OPEN,
    FRAMES_PER_SECOND,
    IDLE_AT_ONCE,
    IDLE_PER_SECOND,
    RESETS_AT_ONCE,
    Budget,
)
from secfunet.xen.errors import BudgetError
from secfunet.xen.host_end import LONGEST_PENALTY, MAX_CHANNELS, HostEnd, HostState
from secfunet.xen.link import MAX_UNSENT, Link
from secfunet.xen.multiplex import CREDIT, MAX_STREAMS, FrameType, Multiplexer
from tests.secfunet_xen.hostile import (
    EFFECTLESS,
    HELLO,
    RING,
    Ring,
    bytes_one_by_one,
    flooded,
    frame,
    opens,
    opens_and_resets,
)
from tests.secfunet_xen.memory import MemoryChannel
from tests.secfunet_xen.test_link import Xen, until


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    yield path
    shutil.rmtree(path)


class Watch:
    """Another task of the loop: how many bytes were acted on between two of its turns, and how much the link held at most."""

    def __init__(self, link: Link, ring: Ring) -> None:
        self._link, self._ring = link, ring
        self.bytes_a_turn: list[int] = []
        self.tasks = self.descriptors = 0

    async def __call__(self) -> None:
        before = 0
        while True:
            await asyncio.sleep(0)
            done = self._ring.taken - len(self._link._multiplexer._input)
            self.bytes_a_turn.append(done - before)
            before = done
            self.tasks = max(self.tasks, len(asyncio.all_tasks()))
            self.descriptors = max(self.descriptors, len(os.listdir("/proc/self/fd")))  # noqa: PTH208


@contextlib.asynccontextmanager
async def watched(folder: Path, frames: Iterator[bytes]) -> AsyncIterator[tuple[Link, Watch, asyncio.Task[str]]]:
    ring = Ring(frames)
    async with flooded(folder, ring) as (link, running):
        watch = Watch(link, ring)
        watching = asyncio.create_task(watch())
        try:
            yield link, watch, running
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize("what", EFFECTLESS)
async def test_frames_that_change_nothing_end_the_channel(folder: Path, what: str) -> None:
    first, again = EFFECTLESS[what]
    async with watched(folder, itertools.chain(first, itertools.repeat(again))) as (link, watch, running):
        async with asyncio.timeout(20):
            assert "change nothing" in await running
        assert isinstance(link.error, BudgetError)
        assert max(watch.bytes_a_turn) <= FRAMES_A_TURN * len(again) + len(HELLO) + sum(map(len, first))


@pytest.mark.parametrize("service", [b"agent", b"nobody"])
async def test_opens_and_resets_make_no_more_than_a_bound(folder: Path, service: bytes) -> None:
    tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    async with watched(folder, opens_and_resets(service)) as (link, watch, running):
        async with asyncio.timeout(20):
            await running
        assert isinstance(link.error, BudgetError)
        # Three tasks a stream, and two of the service; the link's own, the server's, and this test's.
        assert watch.tasks <= tasks + 5 * MAX_STREAMS + 8
        assert watch.descriptors <= descriptors + 2 * MAX_STREAMS + 4


async def test_streams_that_are_opened_and_held_are_bounded(folder: Path) -> None:
    async with watched(folder, opens(b"agent")) as (link, watch, running):
        async with asyncio.timeout(20):
            assert "change nothing" in await running  # those that are refused
        assert isinstance(link.error, BudgetError)
        assert watch.tasks <= 5 * MAX_STREAMS + 12  # with those of the service that accepts them


async def test_a_flood_with_effect_is_read_at_the_rate_and_not_ended(folder: Path) -> None:
    """Bytes that the service swallows, one a frame: nothing of it is against the protocol."""

    one = frame(FrameType.DATA, 1, b"x")
    ring = Ring(bytes_one_by_one())
    loop = asyncio.get_running_loop()
    begin = loop.time()
    async with flooded(folder, ring) as (link, running):
        watch = Watch(link, ring)
        watching = asyncio.create_task(watch())
        await until(lambda: ring.taken > (FRAMES_AT_ONCE + RING // 9) * len(one))
        await asyncio.sleep(1)
        took = loop.time() - begin
        assert not running.done()
        watching.cancel()
    assert ring.taken / len(one) <= FRAMES_AT_ONCE + FRAMES_PER_SECOND * took + RING
    assert max(watch.bytes_a_turn) <= FRAMES_A_TURN * len(one) + len(HELLO) + 13


async def test_what_waits_for_a_service_that_does_not_read_is_bounded(folder: Path) -> None:
    async def stuck(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    server = await asyncio.start_unix_server(stuck, folder / "stuck", limit=1024)
    one = frame(FrameType.DATA, 1, b"xy")
    data = itertools.repeat(one, CREDIT // 2)
    waiting = asyncio.Event()

    class Patient(Ring):
        async def read(self) -> bytes:
            if not (data := await super().read()):
                waiting.set()
                await asyncio.sleep(60)
            return data

    frames = itertools.chain([frame(FrameType.OPEN, 1, b"stuck")], data)
    budget = Budget(monotonic=itertools.count(0, 10).__next__)  # time enough
    link = Link(Patient(frames), services={"stuck": folder / "stuck"}, budget=budget)
    running = asyncio.create_task(link.run())
    async with asyncio.timeout(20):
        await waiting.wait()
    assert all(len(carried.received) <= CREDIT for carried in link._carried.values())
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    server.close()


async def test_what_waits_for_a_guest_that_does_not_read_is_bounded(folder: Path) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65536))
                await writer.drain()

    server = await asyncio.start_unix_server(flood, folder / "flood")
    host, guest = MemoryChannel.pair()
    link = Link(host, services={"flood": folder / "flood"})
    running = asyncio.create_task(link.run())
    opens = b"".join(frame(FrameType.OPEN, number, b"flood") for number in range(1, MAX_STREAMS + 1))
    await guest.write(HELLO + opens)
    most = 0
    for _ in range(100):
        await asyncio.sleep(0.01)
        most = max(most, link._multiplexer.unsent)
    assert MAX_UNSENT <= most <= MAX_UNSENT + MAX_STREAMS * 16384 + 16384
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    server.close()


async def test_a_reset_ends_the_work_for_its_stream(folder: Path) -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        closed.set()
        writer.close()

    server = await asyncio.start_unix_server(serve, folder / "agent")
    host, guest = MemoryChannel.pair()
    link = Link(host, services={"agent": folder / "agent"})
    running = asyncio.create_task(link.run())
    await guest.write(HELLO + frame(FrameType.OPEN, 1, b"agent"))
    await until(lambda: link._carried and link._carried[1].streams is not None)
    await guest.write(frame(FrameType.RESET, 1, b"\2"))
    async with asyncio.timeout(5):
        await closed.wait()
    await until(lambda: not link._tasks)
    assert not link._carried
    assert not link._multiplexer._held
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    server.close()


def test_a_place_is_free_when_its_work_is_gone_not_when_the_guest_says_so() -> None:
    host = Multiplexer(is_host=True)
    host.receive(HELLO)
    for number in range(1, MAX_STREAMS + 1):
        assert host.receive(frame(FrameType.OPEN, number, b"agent") + frame(FrameType.RESET, number, b"\2"))
    assert host.streams == 0
    assert host.receive(frame(FrameType.OPEN, MAX_STREAMS + 1, b"agent")) == []
    host.release(1)
    assert host.receive(frame(FrameType.OPEN, MAX_STREAMS + 2, b"agent"))


def test_the_bounds_in_time() -> None:
    now = 0.0
    budget = Budget(lambda: now)
    assert budget.spend(FRAMES_AT_ONCE, 0, BYTES_AT_ONCE) == 0
    assert budget.spend(FRAMES_PER_SECOND, 0, 0) == pytest.approx(1)
    now = 1.0
    assert budget.spend(0, 0, 0) == pytest.approx(0)
    assert budget.spend(0, 0, BYTES_PER_SECOND * 2) == pytest.approx(1)  # one second's worth was there again
    now = 3.0
    assert budget.spend(1, 1, 0) == 0
    for _ in range(IDLE_AT_ONCE):
        budget.idle()
    with pytest.raises(BudgetError):
        budget.idle()
    now = 4.0
    for _ in range(IDLE_PER_SECOND):
        budget.idle()
    with pytest.raises(BudgetError):
        budget.idle()
    for _ in range(RESETS_AT_ONCE):
        budget.reset()
    with pytest.raises(BudgetError):
        budget.reset()


def test_an_open_counts_for_what_it_costs() -> None:
    budget = Budget(lambda: 0.0)
    assert budget.spend(FRAMES_AT_ONCE // FRAMES_OF_AN_OPEN, FRAMES_AT_ONCE // FRAMES_OF_AN_OPEN, 0) == 0
    assert budget.spend(1, 1, 0) > 0


async def test_a_guest_that_breaks_its_channels_gets_no_more_in_its_run(caplog: pytest.LogCaptureFixture) -> None:
    xen, pauses, told = Xen(), list[float](), list[str]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    end = HostEnd(xen.make, {}, "db", flooded=told.append, clock=lambda: 5.0, sleep=sleep)  # type: ignore[arg-type]
    assert end.status.state is HostState.WAITING
    caplog.set_level(logging.INFO, "secfunet.xen.host_end")
    await end.start()
    for _ in range(MAX_CHANNELS):
        guest = await asyncio.wait_for(xen.waiting.get(), 10)
        with contextlib.suppress(Exception):
            await guest.write(HELLO + frame(FrameType.PONG) * (IDLE_AT_ONCE + 10))
    await until(lambda: end.status.state is HostState.REFUSED)
    assert end.status.channels == len(xen.made) == MAX_CHANNELS
    assert all(channel.closed for channel in xen.made)
    assert end.status.since == 5.0
    assert "it has had the 9 channels of its run; the last one: the guest floods" in end.status.why
    assert len(told) == MAX_CHANNELS  # once a channel
    assert len(caplog.records) == MAX_CHANNELS + 1
    assert pauses == sorted(pauses)
    assert pauses[0] >= 10
    assert pauses[-1] == LONGEST_PENALTY
    await end.close()
    assert end.status.state is HostState.CLOSED


async def test_a_guest_that_only_comes_and_goes_gets_no_more_either(caplog: pytest.LogCaptureFixture) -> None:
    """It may keep the pages of each channel mapped: nothing tells dom0."""
    xen, told = Xen(), list[str]()

    async def sleep(seconds: float) -> None:
        return

    end = HostEnd(xen.make, {}, "db", flooded=told.append, sleep=sleep)  # type: ignore[arg-type]
    await end.start()
    for _ in range(MAX_CHANNELS):
        await (await asyncio.wait_for(xen.waiting.get(), 10)).close()
    await until(lambda: end.status.state is HostState.REFUSED)
    assert len(xen.made) == MAX_CHANNELS
    assert not told
    assert sum("gets no more" in record.message for record in caplog.records) == 1
    await end.close()


async def test_dom0_may_allow_a_guest_more_channels() -> None:
    """Its agent was restarted again and again, and it is honest: it need not be started anew for that."""
    xen = Xen()

    async def sleep(seconds: float) -> None:
        return

    async def come_and_go(times: int) -> None:
        for _ in range(times):
            await (await asyncio.wait_for(xen.waiting.get(), 10)).close()

    end = HostEnd(xen.make, {}, "db", sleep=sleep)  # type: ignore[arg-type]
    await end.start()
    end.allow_more()  # as at the begin of a run: it changes nothing
    await come_and_go(MAX_CHANNELS)
    await until(lambda: end.status.state is HostState.REFUSED)
    assert len(xen.made) == MAX_CHANNELS
    end.allow_more()
    assert end.status.state is not HostState.REFUSED
    end.allow_more()
    await come_and_go(MAX_CHANNELS)
    await until(lambda: end.status.state is HostState.REFUSED)
    assert len(xen.made) == 2 * MAX_CHANNELS
    await end.close()
    end.allow_more()
    assert end.status.state is HostState.CLOSED


async def test_the_budget_of_a_guest_is_not_new_with_each_channel() -> None:
    xen = Xen()

    async def sleep(seconds: float) -> None:
        return

    end = HostEnd(xen.make, {}, "db", sleep=sleep)  # type: ignore[arg-type]
    await end.start()
    for _ in range(2):
        guest = await asyncio.wait_for(xen.waiting.get(), 10)
        await guest.write(HELLO + frame(FrameType.PONG) * (IDLE_AT_ONCE * 3 // 4))
        await until(lambda: end.alive or end.status.channels > 1)
        await asyncio.sleep(0.1)
        if end.status.channels == 1:
            await guest.close()
    await until(lambda: "change nothing" in end.status.why)
    await end.close()


async def test_events_without_end_are_taken_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    class Library:
        memory = vchan.ctypes.create_string_buffer(88)
        descriptor = os.eventfd(1)  # never taken: readable for ever

        def libxenvchan_server_init(self, *_: object) -> int:
            return vchan.ctypes.addressof(self.memory)

        def libxenvchan_fd_for_select(self, _: int) -> int:
            return self.descriptor

        def libxenvchan_is_open(self, _: int) -> int:
            return 1

        def libxenvchan_read(self, *_: object) -> int:
            return 0

        def libxenvchan_wait(self, _: int) -> int:
            nonlocal calls
            calls += 1
            return 0

        def libxenvchan_close(self, _: int) -> None:
            os.close(self.descriptor)

    monkeypatch.setattr(vchan, "_library", Library)
    monkeypatch.setattr(vchan, "EVENTS_AT_ONCE", 50)
    monkeypatch.setattr(vchan, "EVENTS_PER_SECOND", 100)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    channel = await vchan.Vchan.serve(1, "/path")
    reading = asyncio.create_task(channel.read())
    await asyncio.sleep(0.5)
    took = loop.time() - begin
    assert calls <= 50 + 100 * took + took / vchan.EVENT_PAUSE + 2
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await channel.close()


async def test_a_channel_is_broken_off_once_and_counts_as_broken() -> None:
    xen, told, pauses = Xen(), list[str](), list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    end = HostEnd(xen.make, {}, "db", flooded=told.append, sleep=sleep)  # type: ignore[arg-type]
    await end.start()
    end.hang_up("nobody is there")
    guest = await asyncio.wait_for(xen.waiting.get(), 10)
    await guest.write(HELLO)
    await until(lambda: end.alive)
    end.hang_up("too many calls")
    end.hang_up("too many calls")
    await until(lambda: len(xen.made) == 2)
    assert told == ["too many calls"]
    assert pauses == [10]
    await end.close()
