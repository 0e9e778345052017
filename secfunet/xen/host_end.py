"""dom0's end of a domain's channel: served as long as the domain runs, whatever its guest does with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from secfunet.xen.errors import XenError
from secfunet.xen.link import Link
from secfunet.xen.vchan import Vchan

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before the channel is made anew
CALM = 30.0  # seconds that a channel has to last for the next pause to be the first again


class HostEnd:
    """Made by ``serve``. After each guest that leaves (its agent restarted, say) there is a new channel, with new pages.

    Pages of a guest that keeps them mapped are not free: so a guest that comes and goes again and again has to wait longer and longer.
    """

    def __init__(self, make: Callable[[], Awaitable[Vchan]], services: Mapping[str, Path], name: str) -> None:
        self._make = make
        self._services = dict(services)
        self._name = name
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def serve(cls, domain_id: int, path: str, services: Mapping[str, Path], *, name: str = "") -> HostEnd:
        """Serves a channel for domain ``domain_id`` at the absolute xenstore ``path``; it is there when this returns.

        ``services``: the Unix socket of each. ``name``: for the log. Raises XenError.
        """
        end = cls(lambda: Vchan.serve(domain_id, path), services, name or str(domain_id))
        first = await end._make()
        end._task = asyncio.create_task(end._serve(first), name=f"vchan-{end._name}")
        return end

    @property
    def alive(self) -> bool:
        """The guest's end is connected and speaks."""
        return self._link is not None and self._link.alive

    async def close(self, grace: float = 0.0) -> None:
        """The end of it; with ``grace`` the guest is told first, and has so many seconds to close its own end."""
        if self._link is not None and grace > 0:
            await self._link.go_away(grace)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _serve(self, channel: Vchan) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        made: Vchan | None = channel
        while True:
            begin = loop.time()
            if made is not None:
                await self._serve_once(made)
            pause = FIRST_PAUSE if loop.time() - begin >= CALM else min(pause * 2, LONGEST_PAUSE)
            await asyncio.sleep(pause)
            try:
                made = await self._make()
            except XenError as error:
                log.warning("a domain's channel cannot be made again: %s", error, extra={"vm": self._name})
                made = None

    async def _serve_once(self, channel: Vchan) -> None:
        try:
            with contextlib.suppress(XenError):
                await channel.accepted()
                self._link = Link(channel, services=self._services)
                why = await self._link.run()
                log.info("a domain's channel ended: %s", why, extra={"vm": self._name})
        finally:
            self._link = None
            await channel.close()
