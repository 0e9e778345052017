"""A channel of shared memory a domain: dom0 names the domain by its number, and Xen maps the pages for no other.

The guest needs no network. Behind the channel are the same servers, on Unix sockets that nobody but this daemon can open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from dom0_middleware.channels.folder import DomainFolders
from dom0_middleware.channels.port import (
    ChannelAddresses,
    ChannelDomain,
    ChannelError,
    ChannelState,
    ChannelStatus,
    Flooded,
    JoinInformation,
)
from dom0_middleware.channels.xenstore_join import XenstoreJoin
from secfunet.xen import AGENT_SERVICE, ENROL_SERVICE, VCHAN_PATH, home
from secfunet.xen.errors import XenError
from secfunet.xen.host_end import HostEnd, HostState

_STATES = {
    HostState.OPEN: ChannelState.OPEN,
    HostState.WAITING: ChannelState.WAITING,
    HostState.PAUSED: ChannelState.PAUSED,
    HostState.REFUSED: ChannelState.REFUSED,
    HostState.CLOSED: ChannelState.UNKNOWN,
}


class VchanChannel:
    """See ``port.GuestChannel``."""

    through_xen = True

    def __init__(self, folder: Path, *, flooded: Flooded) -> None:
        self._flooded = flooded
        self._folders = DomainFolders(folder)
        self._join = XenstoreJoin()
        self._ends: dict[str, HostEnd] = {}

    async def open(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.make(domain.uuid)
        return await self._serve(domain)

    async def reopen(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.keep(domain.uuid)
        return await self._serve(domain)

    def folder(self, uuid: str) -> str:
        return ""

    def status(self, uuid: str) -> ChannelStatus:
        if (end := self._ends.get(uuid)) is None:
            return ChannelStatus()
        status = end.status
        return ChannelStatus(_STATES[status.state], status.since, status.why)

    def hang_up(self, uuid: str, why: str) -> None:
        if (end := self._ends.get(uuid)) is not None:
            end.hang_up(why)

    async def hand_over(self, join: JoinInformation) -> None:
        await self._join.hand_over(join)
        # A guest whose agent was restarted so often that it has no channel left could not use it.
        if (end := self._ends.get(join.uuid)) is not None:
            end.allow_more()

    async def erase_join(self, uuid: str) -> None:
        await self._join.erase(uuid)

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        await self._join.erase(uuid)
        self._join.forget(uuid)
        end = self._ends.pop(uuid, None)
        if end is not None:
            await end.close(grace)
        self._folders.remove(uuid)

    async def sweep(self, running: Iterable[str]) -> None:
        self._folders.sweep(running)

    async def stop(self) -> None:
        ends, self._ends = list(self._ends.values()), {}
        await asyncio.gather(*(end.close() for end in ends))

    async def _serve(self, domain: ChannelDomain) -> ChannelAddresses:
        if domain.domain_id is None:
            raise ChannelError("a vchan is for a domain that exists")
        enrol, agent = self._folders.sockets(domain.uuid)
        path = f"{home(domain.domain_id)}/{VCHAN_PATH}"
        try:
            self._ends[domain.uuid] = await HostEnd.serve(
                domain.domain_id,
                path,
                {ENROL_SERVICE: enrol, AGENT_SERVICE: agent},
                name=domain.uuid,
                flooded=partial(self._flooded, domain.uuid),
            )
        except XenError as error:
            raise ChannelError(f"the domain's vchan cannot be served: {error}") from error
        self._join.domain(domain.uuid, domain.domain_id)
        return ChannelAddresses(
            f"unix:{enrol}",
            f"unix:{agent}",
            guest_enrol=f"vchan:{ENROL_SERVICE}",
            guest_agent=f"vchan:{AGENT_SERVICE}",
        )
