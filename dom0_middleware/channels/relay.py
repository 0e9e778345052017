"""Connections of one guest, carried to the servers of its domain: so many at once, and no faster than its budget, whatever it sends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from secfunet.xen.budget import Budget

MAX_CONNECTIONS = 16
_READ_SIZE = 65536
_CLOSE_TIMEOUT = 1.0  # seconds


async def _no_objection() -> str:
    return ""


async def _for_ever() -> None:
    await asyncio.Event().wait()


class Relay:
    """Of one domain. ``refuse``: told of each connection that is not carried, by a word and a sentence."""

    def __init__(self, refuse: Callable[[str, str], None]) -> None:
        self._refuse = refuse
        self._budget = Budget()
        self._tasks: set[asyncio.Task[None]] = set()
        self._carried = 0
        self.since = time.time()
        """Since when connections are carried, or none is."""

    @property
    def is_used(self) -> bool:
        """A connection is carried."""
        return self._carried > 0

    def take(
        self,
        path: Path,
        connection: socket.socket,
        *,
        objection: Callable[[], Awaitable[str]] = _no_objection,
        watch: Callable[[], Awaitable[None]] = _for_ever,
    ) -> None:
        """Carries ``connection`` to the Unix socket ``path``, if there is no ``objection``, until either side or ``watch`` ends."""
        if len(self._tasks) >= MAX_CONNECTIONS:
            connection.close()
            self._refuse("many", "it has too many connections")
            return
        task = asyncio.ensure_future(self._serve(path, connection, objection, watch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Also of a task that was cancelled before it began.
        task.add_done_callback(lambda _: connection.close())

    def hang_up(self) -> bool:
        """Ends all of them; False if there was none that does not end already."""
        ending = [task for task in self._tasks if not task.cancelling()]
        for task in ending:
            task.cancel()
        return bool(ending)

    async def close(self) -> None:
        """The same; returns when they have ended."""
        self.hang_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(
        self,
        path: Path,
        connection: socket.socket,
        objection: Callable[[], Awaitable[str]],
        watch: Callable[[], Awaitable[None]],
    ) -> None:
        try:
            if why := await objection():
                self._refuse("foreign", why)
                return
            reader, writer = await asyncio.open_connection(sock=connection)
            self._count(1)
            try:
                await self._carry(path, reader, writer, watch)
            finally:
                self._count(-1)
                writer.transport.abort()
        except OSError:
            pass  # either side is gone

    async def _carry(
        self,
        path: Path,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        watch: Callable[[], Awaitable[None]],
    ) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        work = [
            asyncio.ensure_future(_copy(reader, inner_writer, self._budget)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
            asyncio.ensure_future(watch()),
        ]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await _finish(writer)
            inner_writer.transport.abort()

    def _count(self, more: int) -> None:
        before = self.is_used
        self._carried += more
        if self.is_used is not before:
            self.since = time.time()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: Budget | None = None) -> None:
    """Until its end. With a ``budget``, no faster than that: a guest that always has more must not keep the loop."""
    while data := await reader.read(_READ_SIZE):
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(budget.spend(1, 0, len(data)) if budget is not None else 0)


async def _finish(writer: asyncio.StreamWriter) -> None:
    """What is left for the guest is sent, if it takes it in time."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            await writer.wait_closed()
