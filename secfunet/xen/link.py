"""Both ends of a domain's channel, tied to Unix sockets: what is connected at one end comes out at the other.

dom0 serves the channel and connects each stream to the socket of the service that it names; the guest listens on a socket a service, in a
private folder of its agent, and opens a stream for each connection. A keep-alive notices a peer that is silently gone: a channel that was
open while its guest migrated looks open for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

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
_READ_SIZE = 16384


class Channel(Protocol):
    """Bytes both ways; ``vchan.Vchan`` is one."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def close(self) -> None: ...
    def abandon(self) -> None: ...


class _SilentError(VchanError):
    """The peer gives no sign of life, and the channel looks open all the same."""


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Carried:
    """One stream, and the socket that it is tied to once that is connected."""

    def __init__(self, stream: int, streams: Streams | None = None) -> None:
        self.stream = stream
        self.streams = streams
        self.received: asyncio.Queue[bytes | None] = asyncio.Queue()  # bounded by the stream's credit
        self.credited = asyncio.Event()

    def close(self) -> None:
        """Wakes whoever waits on it, and closes the socket."""
        self.credited.set()
        self.received.put_nowait(None)
        if self.streams is not None:
            self.streams[0].feed_eof()
            self.streams[1].close()


class Link:
    """One open channel, from its first byte to its last."""

    def __init__(
        self,
        channel: Channel,
        *,
        services: Mapping[str, Path] | None = None,
        ping_interval: float = PING_INTERVAL,
        dead_after: float = DEAD_AFTER,
    ) -> None:
        """``services``: dom0's end, and where each service listens; None: the guest's end."""
        self._channel = channel
        self._services = services
        self._multiplexer = Multiplexer(is_host=services is not None)
        self._ping_interval = ping_interval
        self._dead_after = dead_after
        self._carried: dict[int, _Carried] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_send = asyncio.Event()
        self._to_send.set()  # HELLO
        self._last_sign = 0.0
        self._closing = asyncio.Event()
        self.alive = False
        """The peer has said HELLO, and the channel has not ended."""
        self.on_alive: Callable[[], None] = lambda: None

    async def run(self) -> str:
        """Carries until the channel ends; why it did, for a log. The channel is closed then, with all that it carried."""
        loop = asyncio.get_running_loop()
        self._last_sign = loop.time()
        work = [asyncio.ensure_future(part()) for part in (self._read, self._write, self._keep_alive)]
        is_silent = False
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            why = "the channel was closed"
            for task in done:
                error = task.exception()
                is_silent |= isinstance(error, _SilentError)
                if isinstance(error, XenError):
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
            for carried in self._carried.values():
                carried.close()
            self._carried.clear()
            if is_silent and self._services is None:
                self._channel.abandon()  # the guest was migrated under it: what is closed then takes the kernel's driver with it
            else:
                await self._channel.close()

    def carry(self, service: str, streams: Streams) -> None:
        """Of the guest's end: ties a connection to a new stream. Raises MultiplexError if there are too many."""
        carried = _Carried(self._multiplexer.open(service), streams)
        self._carried[carried.stream] = carried
        self._spawn(self._carry_both_ways(carried, streams))
        self._to_send.set()

    async def go_away(self, grace: float) -> None:
        """Tells the guest to close its end, and returns when it has, or after ``grace`` seconds."""
        self._multiplexer.go_away()
        self._to_send.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._closing.wait()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await self._channel.read():
                self._last_sign = loop.time()
                for event in self._multiplexer.receive(data):
                    self._act(event)
                if self._multiplexer.greeted and not self.alive:
                    self.alive = True
                    self.on_alive()
                self._to_send.set()
        finally:
            self._closing.set()

    async def _write(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            if data := self._multiplexer.data_to_send():
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
                carried = self._carried[stream] = _Carried(stream)
                self._spawn(self._connect(carried, service))
            case Received(stream, data):
                self._pass(stream, data)
            case Credited(stream):
                if stream in self._carried:
                    self._carried[stream].credited.set()
            case Ended(stream):
                self._pass(stream, None)
            case Reset(stream, _):
                self._drop(stream)
            case WentAway():
                raise VchanError("the peer closes the channel")
            case Ponged():
                pass

    async def _connect(self, carried: _Carried, service: str) -> None:
        """Of dom0's end. What the guest sends meanwhile is within its credit, and waits in the stream's queue."""
        path = (self._services or {}).get(service)
        try:
            if path is None:
                raise ConnectionRefusedError
            async with asyncio.timeout(CONNECT_TIMEOUT):
                carried.streams = await asyncio.open_unix_connection(path)
        except (OSError, TimeoutError):
            self._carried.pop(carried.stream, None)
            self._multiplexer.reset(carried.stream, ResetReason.REFUSED)
            self._to_send.set()
            return
        await self._carry_both_ways(carried, carried.streams)

    async def _carry_both_ways(self, carried: _Carried, streams: Streams) -> None:
        reader, writer = streams
        try:
            await asyncio.gather(self._carry_out(carried, reader), self._carry_in(carried, writer))
        except OSError:
            pass  # whoever used the socket is gone; the other side is told below
        finally:
            self._multiplexer.reset(carried.stream)
            self._to_send.set()
            if self._carried.get(carried.stream) is carried:
                del self._carried[carried.stream]
            writer.close()

    async def _carry_out(self, carried: _Carried, reader: asyncio.StreamReader) -> None:
        """From the socket into the channel."""
        stream, multiplexer = carried.stream, self._multiplexer
        while multiplexer.is_open(stream):
            if not (credit := multiplexer.credit(stream)):
                carried.credited.clear()
                await carried.credited.wait()
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
        while (data := await carried.received.get()) is not None:
            writer.write(data)
            await writer.drain()
            self._multiplexer.consumed(carried.stream, len(data))
            self._to_send.set()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()

    def _pass(self, stream: int, data: bytes | None) -> None:
        if stream in self._carried:
            self._carried[stream].received.put_nowait(data)

    def _drop(self, stream: int) -> None:
        if (carried := self._carried.pop(stream, None)) is not None:
            carried.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
