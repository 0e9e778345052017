"""Join information through xenstore: dom0 writes it into the domain's home, readable for this domain alone, and removes it once it is used.

It is on no disk, in no XML and in no process's arguments. xenstored forgets a domain's home with the domain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dom0_middleware.channels.port import ChannelError, JoinInformation
from secfunet.xen import JOIN_PATH, home
from secfunet.xen.errors import XenError
from secfunet.xen.xenstore import Xenstore

log = logging.getLogger(__name__)


class XenstoreJoin:
    """Of all domains; knows their numbers from ``domain``."""

    def __init__(self) -> None:
        self._domains: dict[str, int] = {}
        self._order = asyncio.Lock()

    def domain(self, uuid: str, domain_id: int) -> None:
        """The present run of ``uuid`` is domain ``domain_id``."""
        self._domains[uuid] = domain_id

    def forget(self, uuid: str) -> None:
        self._domains.pop(uuid, None)

    async def hand_over(self, join: JoinInformation) -> None:
        """Raises ChannelError."""
        domain_id = self._domains.get(join.uuid)
        if domain_id is None:
            raise ChannelError("this domain does not run: it has no home in xenstore")

        def write() -> None:
            with Xenstore() as xenstore:
                xenstore.write(f"{home(domain_id)}/{JOIN_PATH}", join.to_json(), readers=(domain_id,))

        try:
            await self._in_order(write)
        except XenError as error:
            raise ChannelError(f"the join information cannot be handed over: {error}") from error

    async def erase(self, uuid: str) -> None:
        """Does nothing if it is gone."""
        domain_id = self._domains.get(uuid)
        if domain_id is None:
            return

        def remove() -> None:
            with Xenstore() as xenstore:
                # Of a domain that is gone nothing is there; nothing must be made there by asking.
                xenstore.remove(f"{home(domain_id)}/{JOIN_PATH}")

        try:
            await self._in_order(remove)
        except XenError as error:
            log.warning("used join information cannot be removed: %s", error, extra={"vm": uuid})

    async def _in_order(self, work: Callable[[], None]) -> None:
        """One after the other, also if the caller gives up: what one agent's enrolment erases must not be the next invitation."""

        async def act() -> None:
            async with self._order:
                await asyncio.to_thread(work)

        await asyncio.shield(asyncio.ensure_future(act()))
