"""Runs: what a domain has of us from the moment it is started until it stops, and how that begins and ends.

A run is a channel with its servers, a join secret, the certificates that were issued in it, and a session with the grid. Whatever way a
domain stops (our API, another program, a crash), the end of its run is the same, and is complete whatever fails on the way: nothing is
permitted any more, serials and join secret are forgotten, the session is ended, the servers stopped, the channel removed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from dom0_middleware.authority import SERVER_NAME
from dom0_middleware.channels.port import ChannelAddresses, ChannelDomain, ChannelStatus, GuestChannel, JoinInformation
from dom0_middleware.enrolment import JoinSecrets
from dom0_middleware.errors import MiddlewareError, Reason, Refused
from dom0_middleware.guest import GuestDomain
from dom0_middleware.guest_authority import GuestAuthority
from dom0_middleware.hypervisor import DomainInfo, DomainState, Hypervisor
from dom0_middleware.metrics import Metrics
from dom0_middleware.sessions import VmSessions
from dom0_middleware.state import RunRecord, StateStore, VmRecord

log = logging.getLogger(__name__)


class GuestServers(Protocol):
    """The servers of each domain's channel."""

    async def open(self, guest: GuestDomain, addresses: ChannelAddresses) -> None: ...
    async def close(self, uuid: str) -> None: ...


class Runs:
    """The present runs. Whoever calls ``begin``, ``resume`` or ``end`` holds the VM's lock."""

    def __init__(
        self,
        *,
        store: StateStore,
        hypervisor: Hypervisor,
        channel: GuestChannel,
        servers: GuestServers,
        sessions: VmSessions,
        secrets: JoinSecrets,
        authority: GuestAuthority,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._channel = channel
        self._servers = servers
        self._sessions = sessions
        self._secrets = secrets
        self._authority = authority
        self._metrics = metrics
        self._clock = clock
        self._guests: dict[str, GuestDomain] = {}
        self._addresses: dict[str, ChannelAddresses] = {}

    def guest(self, uuid: str) -> GuestDomain | None:
        return self._guests.get(uuid)

    def guests(self) -> tuple[GuestDomain, ...]:
        return tuple(self._guests.values())

    def folder(self, uuid: str) -> str:
        """The folder of a run's channel ("" where it travels through the hypervisor)."""
        return self._channel.folder(uuid)

    def channel_status(self, uuid: str) -> ChannelStatus:
        """What the channel of a domain is doing."""
        return self._channel.status(uuid)

    def hang_up(self, uuid: str, why: str) -> None:
        """Ends what a domain's channel carries now: its guest goes beyond what is its share."""
        self._channel.hang_up(uuid, why)

    @property
    def can_attach(self) -> bool:
        """A domain that runs already can be given a channel."""
        return self._channel.through_xen

    async def begin(self, record: VmRecord) -> tuple[GuestDomain, DomainInfo]:
        """Lays the channel of a stopped domain and boots it; nothing of the domain runs before its channel is there.

        A channel through Xen is for a domain with a number: such a domain is made, but paused, and goes on once it has its channel. A
        domain that cannot have all of its run does not stay up.
        """
        uuid = record.uuid
        secret = self._secrets.begin_run(uuid)
        guest = self._new_guest(record)
        try:
            if self._channel.through_xen:
                info = await self._hypervisor.create(uuid, paused=True)
                await self._lay(guest, secret, info.domain_id)
                await self._hypervisor.resume(uuid)
                info = await self._hypervisor.info(uuid) or info
            else:
                await self._lay(guest, secret, None)
                info = await self._hypervisor.create(uuid)
            self._have_booted(guest, info)
        except BaseException:
            await self.end(uuid)
            await self._pull_plug(uuid)
            raise
        return guest, info

    async def attach(self, record: VmRecord, info: DomainInfo) -> GuestDomain:
        """Begins a run of a domain that runs already: it rebooted by itself, another host sent it, or it could not be sent there.

        Refused (VM_STATE_WRONG) where channels cannot be handed to a running domain.
        """
        if not self._channel.through_xen:
            raise Refused(Reason.VM_STATE_WRONG, "this host's channels cannot be handed to a domain that runs already")
        secret = self._secrets.begin_run(record.uuid)
        guest = self._new_guest(record)
        try:
            await self._lay(guest, secret, info.domain_id)
            self._have_booted(guest, info)
        except BaseException:
            await self.end(record.uuid)
            raise
        return guest

    async def _lay(self, guest: GuestDomain, secret: str, domain_id: int | None) -> None:
        """The channel with its servers, and what the domain needs to use them."""
        addresses = await self._channel.open(ChannelDomain(guest.uuid, domain_id, guest.record.address))
        await self._servers.open(guest, addresses)
        self._addresses[guest.uuid] = addresses
        await self._hand_over(guest, secret)

    async def invite(self, guest: GuestDomain) -> None:
        """Hands the running domain another join secret, on its channel; the certificates that it had are not current any more.

        Raises ChannelError if it cannot be handed over: the domain then waits for the next invitation.
        """
        addresses = self._addresses.get(guest.uuid)
        if addresses is None:
            raise Refused(Reason.VM_STATE_WRONG, "this VM has no channel")
        secret = self._secrets.invite(guest.uuid)
        guest.invited()
        await self._hand_over(guest, secret)

    async def _hand_over(self, guest: GuestDomain, secret: str) -> None:
        addresses = self._addresses[guest.uuid]
        await self._channel.hand_over(
            JoinInformation(
                uuid=guest.uuid,
                join_secret=secret,
                guest_authority=self._authority.certificate_pem.decode("ascii"),
                enrol=addresses.guest_enrol,
                agent=addresses.guest_agent,
                server_name=SERVER_NAME,
            )
        )

    def _have_booted(self, guest: GuestDomain, info: DomainInfo) -> None:
        if info.domain_id is None:
            raise Refused(Reason.LIBVIRT_REFUSED, "the domain stopped as soon as it was started")
        # Only now: a run without a number is one whose start never came to its end.
        self._store.set_domain_id(guest.uuid, info.domain_id)
        guest.domain_id = info.domain_id
        guest.set_state(info.state)

    async def resume(self, run: RunRecord, record: VmRecord, info: DomainInfo | None) -> None:
        """After a restart of this daemon: the run goes on if its very domain (``info``) still runs, else it is over."""
        if (
            info is None
            or info.state is DomainState.STOPPED
            or info.domain_id is None
            or info.domain_id != run.domain_id
        ):
            await self.end(run.uuid)
            if run.domain_id is None and self._channel.through_xen and info is not None:
                # This daemon died between making the domain and letting it go.
                await self._pull_plug(run.uuid)
            return
        guest = self._new_guest(record, run)
        guest.domain_id = run.domain_id
        try:
            domain = ChannelDomain(run.uuid, run.domain_id, record.address)
            addresses = await self._channel.reopen(domain)
            await self._servers.open(guest, addresses)
            self._addresses[run.uuid] = addresses
            guest.set_state(info.state)
        except (MiddlewareError, OSError):
            # One guest's folder must not keep the others from their keys.
            log.exception("the channel of a running domain cannot be made again", extra={"vm": run.uuid})
            await self.end(run.uuid)

    async def end(self, uuid: str, *, grace: float = 0.0) -> None:
        """Idempotent. First what takes effect at once and cannot fail, then what has to be waited for.

        With ``grace``, a guest that runs on is told, and has so many seconds to close its end of the channel.
        """
        guest = self._guests.pop(uuid, None)
        self._addresses.pop(uuid, None)
        if guest is not None:
            guest.end()
        self._sessions.end(uuid)
        try:
            self._store.end_run(uuid)
        except MiddlewareError:
            # On file it lives until the next start, of the VM or of this daemon, which sees that its domain is another or gone.
            log.warning("the end of a run could not be written", extra={"vm": uuid})
        try:
            await self._servers.close(uuid)
        finally:
            try:
                await self._channel.close(uuid, grace=grace)
            except OSError:
                log.exception("a channel could not be removed", extra={"vm": uuid})
            self._metrics.guests.set(len(self._guests))

    async def close(self) -> None:
        """Stops every server; the runs go on when the daemon does."""
        for uuid in list(self._guests):
            await self._servers.close(uuid)
        await self._channel.stop()

    async def sweep(self) -> None:
        """Removes channels that belong to no run."""
        await self._channel.sweep(self._guests)

    async def secret_used(self, guest: GuestDomain) -> None:
        """Its agent has what it needs from the join information."""
        await self._channel.erase_join(guest.uuid)

    async def _pull_plug(self, uuid: str) -> None:
        """Of what may have booted although booting failed. Where that fails too, the VM is shown as running and not enrolled."""
        with contextlib.suppress(MiddlewareError):
            info = await self._hypervisor.info(uuid)
            if info is not None and info.state is not DomainState.STOPPED:
                log.warning("a domain without a run is destroyed", extra={"vm": uuid})
                await self._hypervisor.destroy(uuid)

    def _new_guest(self, record: VmRecord, run: RunRecord | None = None) -> GuestDomain:
        # As it is now: a revocation waits for no lock, and may have come since the caller read it.
        record = self._store.vm(record.uuid)
        guest = GuestDomain(
            record,
            self._store,
            clock=self._clock,
            hypervisor_answers=lambda: self._hypervisor.connected,
            run=run,
        )
        self._guests[record.uuid] = guest
        self._metrics.guests.set(len(self._guests))
        return guest
