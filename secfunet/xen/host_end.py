"""dom0's end of a domain's channel: served as long as the domain runs and keeps to its bounds, whatever its guest does with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from secfunet.xen.budget import Budget
from secfunet.xen.errors import BudgetError, MultiplexError, XenError
from secfunet.xen.link import Link
from secfunet.xen.vchan import Vchan

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before the channel is made anew
CALM = 30.0  # seconds that a channel has to last for the next pause to be the first again
FIRST_PENALTY, LONGEST_PENALTY = (
    10.0,
    600.0,
)  # the same after a channel that the guest broke; it doubles, and never goes back
MAX_CHANNELS = 9
"""In one run, from its begin or from when dom0 last allowed more. Nothing tells dom0 whether a guest has unmapped the pages of its earlier
channels: so all of them count, nine pages each."""


class HostState(StrEnum):
    """What dom0's end does."""

    WAITING = "waiting"  # for the guest to come
    OPEN = "open"
    PAUSED = "paused"  # a channel ended, the next one is not made yet
    REFUSED = "refused"  # there is no more for this run
    CLOSED = "closed"


@dataclass(frozen=True)
class HostStatus:
    """``since``: seconds since 1970. ``channels``: how many the guest has had. ``why``: how the last one ended, or why there is no more."""

    state: HostState
    since: float
    channels: int
    why: str = ""


class HostEnd:
    """Made by ``serve``. After each guest that leaves (its agent restarted, say) there is a new channel, with new pages.

    Pages of a guest that keeps them mapped are not free, and a guest can keep those of each channel: so there are ``MAX_CHANNELS`` in a run
    and no more, unless dom0 allows more (``allow_more``). A guest that comes and goes again and again has to wait longer and longer; one
    that breaks its channels, much longer.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Vchan]],
        services: Mapping[str, Path],
        name: str,
        *,
        flooded: Callable[[str], None] = lambda why: None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``flooded``: told, with the reason, of each channel that was ended because the guest went beyond its bounds.

        ``clock``, ``sleep``: seconds.
        """
        self._make = make
        self._services = dict(services)
        self._name = name
        self._flooded = flooded
        self._clock = clock
        self._sleep = sleep
        self._budget = Budget()
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._channels = 0
        self._most = MAX_CHANNELS
        self._why = ""
        self._state, self._since = HostState.WAITING, clock()

    @classmethod
    async def serve(
        cls,
        domain_id: int,
        path: str,
        services: Mapping[str, Path],
        *,
        name: str = "",
        flooded: Callable[[str], None] = lambda why: None,
    ) -> HostEnd:
        """Serves a channel for domain ``domain_id`` at the absolute xenstore ``path``; it is there when this returns.

        ``services``: the Unix socket of each. ``name``: for the log. ``flooded``: as above. Raises XenError.
        """
        end = cls(lambda: Vchan.serve(domain_id, path), services, name or str(domain_id), flooded=flooded)
        await end.start()
        return end

    async def start(self) -> None:
        """Makes the first channel, and serves from then on. Raises XenError."""
        first = await self._make()
        self._channels = 1
        self._task = asyncio.create_task(self._serve(first), name=f"vchan-{self._name}")

    def allow_more(self) -> None:
        """The present channel, or else the next one, counts as the first of its run: dom0 trusts that the others are unmapped."""
        if self._state is HostState.CLOSED:
            return
        there_is_one = self._state in (HostState.WAITING, HostState.OPEN)
        self._most = self._channels + MAX_CHANNELS - there_is_one
        if self._state is HostState.REFUSED:
            self._enter(HostState.PAUSED)
            self._task = asyncio.create_task(self._serve(None), name=f"vchan-{self._name}")

    @property
    def alive(self) -> bool:
        """The guest's end is connected and speaks."""
        return self._link is not None and self._link.alive

    @property
    def status(self) -> HostStatus:
        return HostStatus(self._state, self._since, self._channels, self._why)

    def hang_up(self, why: str) -> None:
        """Ends the channel that there is, as one that its guest broke."""
        if self._link is not None:
            self._link.break_off(BudgetError(why))

    async def close(self, grace: float = 0.0) -> None:
        """The end of it; with ``grace`` the guest is told first, and has so many seconds to close its own end."""
        if self._link is not None and grace > 0:
            await self._link.go_away(grace)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._enter(HostState.CLOSED)

    async def _serve(self, channel: Vchan | None) -> None:
        loop = asyncio.get_running_loop()
        pause, penalty = FIRST_PAUSE, FIRST_PENALTY
        made = channel
        while True:
            begin = loop.time()
            broken = False
            if made is not None:
                broken = await self._serve_once(made)
            if self._channels >= self._most:
                self._why = (
                    f"it has had the {MAX_CHANNELS} channels of its run; the last one: {self._why or 'nobody came'}"
                )
                self._enter(HostState.REFUSED)
                log.warning(
                    "a domain has had all channels of its run: it gets no more until it is invited, or started again",
                    extra={"vm": self._name, "channels": self._channels},
                )
                return
            pause = FIRST_PAUSE if loop.time() - begin >= CALM else min(pause * 2, LONGEST_PAUSE)
            self._enter(HostState.PAUSED)
            await self._sleep(penalty if broken else pause)
            if broken:
                penalty = min(penalty * 2, LONGEST_PENALTY)
            try:
                made = await self._make()
                self._channels += 1
            except XenError as error:
                log.warning("a domain's channel cannot be made again: %s", error, extra={"vm": self._name})
                made = None

    async def _serve_once(self, channel: Vchan) -> bool:
        """Returns whether the guest broke the channel."""
        error: XenError | None = None
        try:
            with contextlib.suppress(XenError):
                self._enter(HostState.WAITING)
                await channel.accepted()
                link = self._link = Link(channel, services=self._services, budget=self._budget)
                link.on_alive = lambda: self._enter(HostState.OPEN)
                self._why = await link.run()
                error = link.error
                level = logging.WARNING if isinstance(error, BudgetError) else logging.INFO
                log.log(level, "a domain's channel ended: %s", self._why, extra={"vm": self._name})
        finally:
            self._link = None
            await channel.close()
        if isinstance(error, BudgetError):
            self._flooded(self._why)
        return isinstance(error, MultiplexError)

    def _enter(self, state: HostState) -> None:
        self._state, self._since = state, self._clock()
