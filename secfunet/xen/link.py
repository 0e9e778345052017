"""Both ends of a domain's channel, tied to Unix sockets: what is connected at one end comes out at the other.

dom0 serves the channel and connects each stream to the socket of the service that it names; the guest listens on a socket a service, in a
private folder of its agent, and opens a stream for each connection. A keep-alive notices a peer that is silently gone: a channel that was
open while its guest migrated looks open for ever.

The event loop is everybody's: a peer that always has something to say is read a bounded number of frames at a time, and at the rate of its
budget (``budget``). What is done for a stream (a task, a socket) keeps the stream's place until it is gone, whatever the peer says of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from secfunet.xen.budget import FRAMES_A_TURN, Budget
from secfunet.xen.errors import VchanError, XenError
from secfunet.xen.multiplex import (
    Credited,
    Ended,
    Event,
    Multiplexer,
    Opened,
    Ponged,
    Received,
    Reset,
    ResetReason,
    WentAway,
)

log = logging.getLogger(__name__)

PING_INTERVAL = 5.0  # seconds
DEAD_AFTER = 20.0  # seconds without a sign of life; a suspended domain's clock stands still with it
CONNECT_TIMEOUT = 5.0  # seconds for dom0 to reach a service's socket
CLOSE_TIMEOUT = 1.0  # seconds for a socket to take what is left for it
MAX_UNSENT = 262144  # bytes that wait for a peer to make room in the channel; then no more is read for it
_READ_SIZE = 16384


class Channel(Protocol):
    """Bytes both ways; ``vchan.Vchan`` is one. ``read`` and ``write`` may return without having waited."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def close(self) -> None: ...
    def abandon(self) -> None: ...


class _SilentError(VchanError):
    """The peer gives no sign of life, and the channel looks open all the same."""


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Carried:
    """One stream, the socket that it is tied to once that is connected, and the task that carries it."""

    def __init__(self, stream: int, streams: Streams | None = None) -> None:
        self.stream = stream
        self.streams = streams
        self.task: asyncio.Task[None] | None = None
        self.received = bytearray()  # bounded by the stream's credit
        self.ended = False
        self.changed = asyncio.Event()  # of the two above
        self.credited = asyncio.Event()

    async def close_socket(self) -> None:
        """Returns when it is closed. What came for it is still written, if it takes it in time."""
        if self.streams is None:
            return
        writer = self.streams[1]
        try:
            if self.received and not writer.is_closing():
                writer.write(bytes(self.received))
                self.received.clear()
            writer.close()
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()


class Link:
    """One open channel, from its first byte to its last."""

    def __init__(
        self,
        channel: Channel,
        *,
        services: Mapping[str, Path] | None = None,
        budget: Budget | None = None,
        ping_interval: float = PING_INTERVAL,
        dead_after: float = DEAD_AFTER,
    ) -> None:
        """``services``: dom0's end, and where each service listens; None: the guest's end. ``budget``: of the guest, at dom0's end.

        Without one, dom0's end makes a fresh one.
        """
        self._channel = channel
        self._services = services
        if services is not None and budget is None:
            budget = Budget()
        self._multiplexer = Multiplexer(is_host=services is not None, budget=budget)
        self._ping_interval = ping_interval
        self._dead_after = dead_after
        self._carried: dict[int, _Carried] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_send = asyncio.Event()
        self._to_send.set()  # HELLO
        self._room = asyncio.Event()
        self._last_sign = 0.0
        self._closing = asyncio.Event()
        self._broken: asyncio.Future[None] | None = None
        self.alive = False
        """The peer has said HELLO, and the channel has not ended."""
        self.on_alive: Callable[[], None] = lambda: None
        self.error: XenError | None = None
        """What ended it, if that was the peer or the channel."""

    async def run(self) -> str:
        """Carries until the channel ends; why it did, for a log. The channel is closed then, with all that it carried."""
        loop = asyncio.get_running_loop()
        self._last_sign = loop.time()
        self._broken = loop.create_future()
        work: list[asyncio.Future[None]] = [
            *(asyncio.ensure_future(part()) for part in (self._read, self._write, self._keep_alive)),
            self._broken,
        ]
        is_silent = False
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            why = "the channel was closed"
            for task in done:
                error = task.exception()
                is_silent |= isinstance(error, _SilentError)
                if isinstance(error, XenError):
                    self.error = error
                    why = str(error)
                elif error is not None:
                    log.error("a channel failed", exc_info=error)
                    why = "a fault of this program"
            return why
        finally:
            self.alive = False
            for task in (*work, *self._tasks):
                task.cancel()
            await asyncio.gather(*work, *self._tasks, return_exceptions=True)
            if is_silent and self._services is None:
                self._channel.abandon()  # the guest was migrated under it: what is closed then takes the kernel's driver with it
            else:
                await self._channel.close()

    def carry(self, service: str, streams: Streams) -> None:
        """Of the guest's end: ties a connection to a new stream. Raises MultiplexError if there are too many."""
        carried = _Carried(self._multiplexer.open(service), streams)
        self._begin(carried)
        self._to_send.set()

    def break_off(self, error: XenError) -> None:
        """Ends it now, for ``error``."""
        if self._broken is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def go_away(self, grace: float) -> None:
        """Tells the guest to close its end, and returns when it has, or after ``grace`` seconds."""
        self._multiplexer.go_away()
        self._to_send.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._closing.wait()

    async def _read(self) -> None:
        """Nothing that is awaited for its data need wait for it: so the others have their turn by ``_turn`` alone."""
        loop = asyncio.get_running_loop()
        try:
            while data := await self._channel.read():
                self._last_sign = loop.time()
                self._take(data)
                while self._multiplexer.more:
                    await self._turn()
                    self._take(b"")
                await self._turn()
        finally:
            self._closing.set()

    def _take(self, data: bytes) -> None:
        for event in self._multiplexer.receive(data, most=FRAMES_A_TURN):
            self._act(event)
        if self._multiplexer.greeted and not self.alive:
            self.alive = True
            self.on_alive()
        self._to_send.set()

    async def _turn(self) -> None:
        await asyncio.sleep(self._multiplexer.pause())

    async def _write(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            if data := self._multiplexer.data_to_send():
                self._room.set()
                await self._channel.write(data)

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(self._ping_interval)
            late = loop.time() - before - self._ping_interval
            if late > self._ping_interval:
                # We slept, not the peer: a paused domain, a busy machine.
                self._last_sign = max(self._last_sign, loop.time() - self._ping_interval)
            if loop.time() - self._last_sign > self._dead_after:
                raise _SilentError(f"the peer gave no sign of life for {self._dead_after:g} s")
            self._multiplexer.ping(b"alive")
            self._to_send.set()

    def _act(self, event: Event) -> None:
        match event:
            case Opened(stream, service):
                self._open(stream, service)
            case Received(stream, data):
                self._pass(stream, data)
            case Credited(stream):
                if stream in self._carried:
                    self._carried[stream].credited.set()
            case Ended(stream):
                self._pass(stream, b"", ended=True)
            case Reset(stream, _):
                self._drop(stream)
            case WentAway():
                raise VchanError("the peer closes the channel")
            case Ponged():
                pass

    def _open(self, stream: int, service: str) -> None:
        """Of dom0's end. What the guest sends until the socket is connected is within its credit, and waits with the stream."""
        path = (self._services or {}).get(service)
        if path is None:
            self._multiplexer.release(stream)
            self._multiplexer.refuse(stream)
            return
        self._begin(_Carried(stream), path)

    def _begin(self, carried: _Carried, path: Path | None = None) -> None:
        self._carried[carried.stream] = carried
        carried.task = asyncio.ensure_future(self._carry(carried, path))
        self._tasks.add(carried.task)
        carried.task.add_done_callback(lambda _: self._let_go(carried))

    async def _carry(self, carried: _Carried, path: Path | None) -> None:
        """A stream from its first byte to its last, connected to ``path`` first; ends when the socket is closed."""
        multiplexer = self._multiplexer
        try:
            if path is not None:
                carried.streams = await _connected(path)
            if carried.streams is None:
                multiplexer.reset(carried.stream, ResetReason.REFUSED)
                return
            await self._carry_both_ways(carried, carried.streams)
        except OSError:
            pass  # the other side of the socket is gone; the peer is told below
        finally:
            multiplexer.reset(carried.stream)
            self._to_send.set()
            await carried.close_socket()

    def _let_go(self, carried: _Carried) -> None:
        """Its task is over, or was cancelled before it began: the stream's place is free."""
        assert carried.task is not None  # noqa: S101 - it calls this
        self._tasks.discard(carried.task)
        if self._carried.get(carried.stream) is carried:
            del self._carried[carried.stream]
        if carried.streams is not None:
            carried.streams[1].transport.abort()
        self._multiplexer.reset(carried.stream)
        self._multiplexer.release(carried.stream)
        self._to_send.set()

    async def _carry_both_ways(self, carried: _Carried, streams: Streams) -> None:
        reader, writer = streams
        work = [
            asyncio.ensure_future(way) for way in (self._carry_out(carried, reader), self._carry_in(carried, writer))
        ]
        try:
            await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _carry_out(self, carried: _Carried, reader: asyncio.StreamReader) -> None:
        """From the socket into the channel."""
        stream, multiplexer = carried.stream, self._multiplexer
        while multiplexer.is_open(stream):
            if not (credit := multiplexer.credit(stream)):
                carried.credited.clear()
                await carried.credited.wait()
                continue
            if multiplexer.unsent > MAX_UNSENT:
                self._room.clear()
                await self._room.wait()
                continue
            data = await reader.read(min(credit, _READ_SIZE))
            if not data:
                multiplexer.end(stream)
                self._to_send.set()
                return
            if multiplexer.is_open(stream):
                multiplexer.send(stream, data)
                self._to_send.set()
                # The channel is shared: let the others, and the writer, have their turn.
                await asyncio.sleep(0)

    async def _carry_in(self, carried: _Carried, writer: asyncio.StreamWriter) -> None:
        """From the channel into the socket."""
        while carried.received or not carried.ended:
            if not carried.received:
                carried.changed.clear()
                await carried.changed.wait()
                continue
            data = bytes(carried.received)
            carried.received.clear()
            writer.write(data)
            await writer.drain()
            self._multiplexer.consumed(carried.stream, len(data))
            self._to_send.set()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()

    def _pass(self, stream: int, data: bytes, *, ended: bool = False) -> None:
        if (carried := self._carried.get(stream)) is not None:
            carried.received += data
            carried.ended |= ended
            carried.changed.set()

    def _drop(self, stream: int) -> None:
        """The peer gave the stream up: so do we, whatever we were about to do for it."""
        carried = self._carried.get(stream)
        if carried is not None and carried.task is not None:
            carried.task.cancel()


async def _connected(path: Path) -> Streams | None:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            return await asyncio.open_unix_connection(path)
    except (OSError, TimeoutError):
        return None
