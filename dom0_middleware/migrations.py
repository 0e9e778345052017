"""VMs that come from another host, and VMs that go to one.

Rules of going: the VM's session and its agent's certificate end, and its channel is closed, before its domain is sent; if it could not be
sent it gets a channel again here; if it was, this host keeps its name and VMID (it may come back), but not its token. Rules of coming: an
orchestrator has told this host which VM is to come (``expect``); its domain gets a channel when it runs here *and* there is a
VM-Auth-Token for this hypervisor, whichever is first. A domain that nobody told of gets nothing.

What is under way is on file before it is done, and ``settle`` makes it true afterwards, from what the hypervisor says: after a failure,
a lost connection, or the end of this daemon or of dom0 in the middle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from dom0_middleware.channels.port import GOING_AWAY
from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable
from dom0_middleware.hypervisor import DomainInfo, DomainState, Hypervisor
from dom0_middleware.identity import HypervisorIdentity
from dom0_middleware.runs import Runs
from dom0_middleware.sessions import VmSessions
from dom0_middleware.state import StateStore, VmRecord
from dom0_middleware.vm_definition import bound, check_token
from secfunet.errors import SecFuNetError
from secfunet.identity import thumbprint

log = logging.getLogger(__name__)

AT_ONCE = 2  # migrations out of this host: each takes the network and a processor
CARD_TIMEOUT = 10.0  # seconds for the hypervisor's card to say its name

Happened = Callable[[str, VmRecord, DomainInfo | None], None]
"""Told of what happened to a VM: ``arrived`` or ``left``."""


class Migrations:
    """Whoever calls holds the VM's lock. ``later``: is to call ``settle`` again in a moment, with the lock."""

    def __init__(
        self,
        *,
        store: StateStore,
        hypervisor: Hypervisor,
        runs: Runs,
        sessions: VmSessions,
        identity: HypervisorIdentity,
        destinations: Mapping[str, str],
        clock: Callable[[], float],
        happened: Happened,
        later: Callable[[str], None],
    ) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._runs = runs
        self._sessions = sessions
        self._identity = identity
        self._destinations = dict(destinations)
        self._clock = clock
        self._happened = happened
        self._later = later
        self._places = asyncio.Semaphore(AT_ONCE)

    # Coming.

    def set_destinations(self, destinations: Mapping[str, str]) -> None:
        """Where VMs may be sent from now on: libvirt's URIs by their names."""
        self._destinations = dict(destinations)

    async def expect(self, record: VmRecord) -> DomainInfo | None:
        """A VM is to come here, or has come already; told again, it only takes the token, if there is one.

        Raises Refused: VM_STATE_WRONG if it is this host's already, BINDING_MISMATCH if that UUID is another domain's or another VM's,
        VM_EXISTS, VM_REVOKED, TOKEN_INVALID.
        """
        if record.vm_auth_token:
            await self._require_own(record, record.vm_auth_token)
        info = await self._hypervisor.info(record.uuid)
        if info is not None and not bound(record, info):
            raise Refused(Reason.BINDING_MISMATCH, "the domain with this UUID here is not that VM's")
        known = self._store.find_vm(record.uuid)
        if known is None:
            self._store.add_vm(record)
        else:
            if (known.name, known.vmid, known.address) != (record.name, record.vmid, record.address):
                raise Refused(Reason.BINDING_MISMATCH, "this host knows that UUID as another VM's")
            if not known.arriving:
                raise Refused(Reason.VM_STATE_WRONG, "this VM is on this host already")
            if record.vm_auth_token:
                self._take_token(known, record.vm_auth_token)
        return await self.settle(record.uuid)

    async def give_token(self, record: VmRecord, vm_auth_token: str) -> DomainInfo | None:
        """Of a VM that is to come, or has come and waits for this. Raises Refused (TOKEN_INVALID, VM_REVOKED)."""
        await self._require_own(record, vm_auth_token)
        self._take_token(record, vm_auth_token)
        return await self.settle(record.uuid)

    async def require_still(self, uuid: str) -> None:
        """Raises Refused (VM_STATE_WRONG) while its domain is on its way, in either direction."""
        if self._store.vm(uuid).leaving or await self._hypervisor.migrating(uuid):
            raise Refused(Reason.VM_STATE_WRONG, "this VM is being migrated")

    def _take_token(self, record: VmRecord, vm_auth_token: str) -> None:
        if record.revoked:
            raise Refused(Reason.VM_REVOKED, "this VM was revoked on this hypervisor; no token helps")
        self._store.set_token(record.uuid, vm_auth_token)

    async def _require_own(self, record: VmRecord, vm_auth_token: str) -> None:
        """The token of the host that the VM comes from is the likeliest mistake."""
        claims = check_token(record, vm_auth_token, self._clock())
        try:
            certificate = await self._identity.certificate(timeout=CARD_TIMEOUT)
        except (SecFuNetError, OSError) as error:
            raise Unavailable(
                Reason.HYPERVISOR_CARD_UNAVAILABLE,
                "the hypervisor's card cannot be asked for whom a token is",
                retry_after=1.0,
            ) from error
        if claims.hvid != thumbprint(certificate):
            raise Refused(Reason.TOKEN_INVALID, "this VM-Auth-Token is for another hypervisor, not for this one")

    # Going.

    async def send(self, uuid: str, destination: str) -> DomainInfo | None:
        """Sends a running VM to one of the destinations; what this host has of its domain then, which is nothing.

        Raises Refused (DESTINATION_NOT_ALLOWED, VM_STATE_WRONG, VM_REVOKED, BINDING_MISMATCH) before anything is done; LIBVIRT_REFUSED
        if it failed.
        """
        uri = self._destinations.get(destination)
        if uri is None:
            known = ", ".join(sorted(self._destinations)) or "none"
            raise Refused(
                Reason.DESTINATION_NOT_ALLOWED,
                f"'{destination[:64]}' is no destination in this host's settings (they name: {known})",
            )
        async with self._places:
            await self._require_movable(self._store.vm(uuid))
            self._store.set_leaving(uuid, destination)
            try:
                # In this order: what it may do here has ended, and the grid knows, before it can be anywhere else.
                await self._runs.end(uuid, grace=GOING_AWAY)
                await self._sessions.told()
                self._require_not_revoked(self._store.vm(uuid))
                log.info("a VM is being sent", extra={"vm": uuid, "destination": destination})
                await self._hypervisor.migrate(uuid, uri)
            except MiddlewareError as error:
                log.warning("a VM could not be sent: %s", error, extra={"vm": uuid, "destination": destination})
                info = await self.settle(uuid)
                if info is not None and info.state is not DomainState.STOPPED:
                    raise Refused(
                        Reason.LIBVIRT_REFUSED, f"the VM goes on here, it could not be sent: {error}"
                    ) from error
                raise
            self._left(self._store.vm(uuid))
            return await self._hypervisor.info(uuid)

    def _require_not_revoked(self, record: VmRecord) -> None:
        if record.revoked:
            raise Refused(Reason.VM_REVOKED, "this VM was revoked here, and would come elsewhere as one that was not")

    async def _require_movable(self, record: VmRecord) -> None:
        self._require_not_revoked(record)
        if record.leaving:
            raise Refused(Reason.VM_STATE_WRONG, "this VM is being migrated already")
        info = await self._hypervisor.info(record.uuid)
        if info is not None and not bound(record, info):
            raise Refused(Reason.BINDING_MISMATCH, "the domain with this UUID is not this VM's")
        if info is None or info.state is not DomainState.RUNNING:
            raise Refused(Reason.VM_STATE_WRONG, "only a VM that runs here can be migrated")
        if not self._runs.can_attach:
            raise Refused(
                Reason.VM_STATE_WRONG, "this host's channels are folders: a VM cannot take its channel to another host"
            )

    # What became of it.

    async def settle(self, uuid: str) -> DomainInfo | None:
        """Makes true what a migration left; what the hypervisor says of the domain. Does nothing for a VM that is simply here."""
        record, info = self._store.vm(uuid), await self._hypervisor.info(uuid)
        if not record.arriving and not record.leaving:
            return info
        here = info if info is not None and bound(record, info) else None
        if here is None:
            if record.leaving:
                self._left(record)
        elif await self._hypervisor.migrating(uuid):
            # On its way here it is a stopped domain, on its way from here a running one.
            self._later(uuid)
        elif here.state is DomainState.STOPPED:
            if record.leaving:
                # dom0 stopped in the middle. Whether it runs over there is for the orchestrator to see, and for the grid.
                self._store.set_here(uuid)
        elif record.leaving or (record.vm_auth_token and not record.revoked and here.state is DomainState.RUNNING):
            await self._take(record, here)
        return info

    async def _take(self, record: VmRecord, info: DomainInfo) -> None:
        if record.arriving and self._store.vm(record.uuid).revoked:
            return  # while the hypervisor was asked
        if self._runs.guest(record.uuid) is None:
            await self._runs.attach(record, info)
        self._store.set_here(record.uuid)
        if record.arriving:
            log.info("a VM has arrived", extra={"vm": record.uuid})
            self._happened("arrived", record, info)

    def _left(self, record: VmRecord) -> None:
        self._store.set_away(record.uuid)
        log.info("a VM has left", extra={"vm": record.uuid, "destination": record.leaving})
        self._happened("left", record, None)

    async def taken(self, uuid: str) -> None:
        """The hypervisor says that somebody else sent the domain to another host: it is not to be defined again here."""
        record = self._store.vm(uuid)
        if not record.arriving and await self._hypervisor.info(uuid) is None:
            self._left(record)
