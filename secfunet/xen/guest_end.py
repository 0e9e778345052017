"""The guest's end of its channel: Unix sockets in a private folder, whose connections come out at dom0's services."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Self

from secfunet.service.unix_socket import bind_unix
from secfunet.xen import VCHAN_PATH
from secfunet.xen.errors import MultiplexError, XenError
from secfunet.xen.link import Channel, Link, Streams
from secfunet.xen.vchan import Vchan

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to open the channel
DOM0 = 0

Connect = Callable[[], Awaitable[Channel]]


async def connect_to_dom0() -> Channel:
    """Opens the channel that dom0 serves for this domain. Raises XenError."""
    return await Vchan.connect(DOM0, VCHAN_PATH)


class GuestEnd:
    """``async with GuestEnd(folder, ("enrol",)):`` listens at ``folder/enrol``, and keeps the channel open.

    A connection that comes while the channel is not open is closed at once: its user tries again.
    """

    def __init__(self, folder: Path, services: Sequence[str], *, connect: Connect = connect_to_dom0) -> None:
        self._folder = folder
        self._services = tuple(services)
        self._connect = connect
        self._link: Link | None = None
        self._stack = AsyncExitStack()
        self._open = asyncio.Event()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for service in self._services:
                path = self.socket(service)
                listener, own = bind_unix(path)
                stack.callback(own.remove)
                server = await asyncio.start_unix_server(partial(self._accept, service), sock=listener)
                stack.callback(server.close)
            task = asyncio.create_task(self._keep_open(), name="vchan")
            stack.push_async_callback(_cancelled, task)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def socket(self, service: str) -> Path:
        """Where ``service`` is reached."""
        return self._folder / service

    @property
    def alive(self) -> bool:
        """dom0's end is connected and speaks."""
        return self._link is not None and self._link.alive

    async def opened(self, *, timeout: float) -> None:
        """Returns when the channel is open, or after ``timeout`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._open.wait()

    async def _accept(self, service: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams: Streams = (reader, writer)
        try:
            if self._link is None or not self._link.alive:
                raise MultiplexError("the channel is not open")
            self._link.carry(service, streams)
        except MultiplexError:
            writer.close()

    async def _keep_open(self) -> None:
        pause = FIRST_PAUSE
        problem = ""
        while True:
            try:
                channel = await self._connect()
            except XenError as error:
                if str(error) != problem:
                    problem = str(error)
                    log.info("the channel to dom0 is not open: %s", problem)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            problem = ""
            self._link = link = Link(channel)
            try:
                lived = False

                def note() -> None:
                    nonlocal lived
                    lived = True
                    self._open.set()
                    log.info("the channel to dom0 is open")

                link.on_alive = note
                why = await link.run()
            finally:
                self._link = None
                self._open.clear()
            log.info("the channel to dom0 ended: %s", why)
            pause = FIRST_PAUSE if lived else min(pause * 2, LONGEST_PAUSE)
            await asyncio.sleep(pause)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
