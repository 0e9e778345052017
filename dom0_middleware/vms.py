"""The life of VMs: what orchestrators ask for and what libvirt says happened, brought together in one place.

For each VM one lock orders requests and events. What was begun goes to its end, also if the caller hangs up: half an act is worse than one
that nobody waited for. A domain gets its channel before it boots (``runs``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from cryptography import x509

from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable
from dom0_middleware.events import EventHub
from dom0_middleware.guest import GuestDomain
from dom0_middleware.hypervisor import DomainEvent, DomainEventKind, DomainInfo, DomainState, Hypervisor
from dom0_middleware.identity import HypervisorIdentity
from dom0_middleware.migrations import Migrations
from dom0_middleware.runs import Runs
from dom0_middleware.sessions import VmSessions
from dom0_middleware.state import StateStore, VmRecord
from dom0_middleware.vm_definition import bound, check_token, definition, new_record, spec
from dom0_middleware.vm_view import describe
from secfunet.middleware.v1 import orchestrator_pb2 as pb

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

_EVENTS = {
    DomainEventKind.STARTED: pb.VM_EVENT_KIND_STARTED,
    DomainEventKind.SUSPENDED: pb.VM_EVENT_KIND_SUSPENDED,
    DomainEventKind.RESUMED: pb.VM_EVENT_KIND_RESUMED,
    DomainEventKind.STOPPED: pb.VM_EVENT_KIND_STOPPED,
    DomainEventKind.MIGRATED: pb.VM_EVENT_KIND_STOPPED,
}
_MIGRATED = {"arrived": pb.VM_EVENT_KIND_ARRIVED, "left": pb.VM_EVENT_KIND_LEFT}
_STOP_POLL = 0.05  # seconds
_SETTLE_POLL = 1.0  # seconds between looks at a migration that this daemon did not begin, or did not see the end of
_CLOSE_TIMEOUT = 10.0  # seconds that what orchestrators asked for may still take when the daemon stops


class Vms:
    """``grid_authority`` is the CA that issues VMIDs, ``boot`` names this boot of the host; ``note`` takes down what happens without
    a request (what, the VM). ``start`` before anything else; ``close`` stops every server, but leaves the domains and their runs as they
    are."""

    def __init__(
        self,
        *,
        store: StateStore,
        hypervisor: Hypervisor,
        runs: Runs,
        sessions: VmSessions,
        events: EventHub,
        identity: HypervisorIdentity,
        destinations: Mapping[str, str],
        grid_authority: x509.Certificate,
        note: Callable[[str, VmRecord], None],
        clock: Callable[[], float],
        boot: str,
    ) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._runs = runs
        self._sessions = sessions
        self._events = events
        self._clock = clock
        self._boot = boot
        self._grid_authority = grid_authority
        self._note = note
        self._migrations = Migrations(
            store=store,
            hypervisor=hypervisor,
            runs=runs,
            sessions=sessions,
            identity=identity,
            destinations=destinations,
            clock=clock,
            happened=self._migrated,
            later=lambda uuid: self._spawn(self._settle_later(uuid)),
        )
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._acts: set[asyncio.Task[Any]] = set()
        self._listing: asyncio.Task[list[pb.Vm]] | None = None

    def set_destinations(self, destinations: Mapping[str, str]) -> None:
        """See Migrations."""
        self._migrations.set_destinations(destinations)

    async def start(self) -> None:
        """Connects to the hypervisor and makes true again what the state file says.

        A VM whose domain is gone (the embedded hypervisor forgets them with its process) is defined again, stopped; not one that is on
        another host. A run goes on if its very domain still runs; any other run is over.
        """
        await self._hypervisor.connect(self._on_event, self._on_connection)
        for record in self._store.vms():
            info = await self._hypervisor.info(record.uuid)
            if info is None:
                if not record.arriving and not record.leaving:
                    await self._define_again(record)
            elif not bound(record, info):
                log.warning("a domain has the UUID of a VM but is another one", extra={"vm": record.uuid})
        self._store.end_runs_before(self._boot)
        for run in self._store.runs():
            uuid = run.uuid
            async with self._lock(uuid):
                record, info = self._store.vm(uuid), await self._hypervisor.info(uuid)
                await self._runs.resume(run, record, info if info is not None and bound(record, info) else None)
        await self._settle_all()
        await self._runs.sweep()

    async def _settle_all(self) -> None:
        """Looks at every VM whose migration may have come to its end unseen."""
        for record in self._store.vms():
            if record.arriving or record.leaving:
                await self._logged(self._look_again(record.uuid))

    async def close(self) -> None:
        if self._acts:
            await asyncio.wait(set(self._acts), timeout=_CLOSE_TIMEOUT)
        tasks = (*self._tasks, *self._acts)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._runs.close()
        await self._hypervisor.close()

    def guests(self) -> tuple[GuestDomain, ...]:
        return self._runs.guests()

    # What orchestrators ask for. Each raises Refused or Unavailable.

    async def create(
        self,
        *,
        uuid: str,
        name: str,
        vm_certificate: bytes,
        vm_auth_token: str,
        memory_mib: int,
        vcpus: int,
        address: str = "",
    ) -> pb.Vm:
        asked = pb.VmDefinition(
            uuid=uuid, name=name, vm_certificate=vm_certificate, memory_mib=memory_mib, vcpus=vcpus, address=address
        )
        record = new_record(asked, authority=self._grid_authority, vm_auth_token=vm_auth_token, now=self._clock())
        return await self._to_its_end(self._create(record))

    async def _create(self, record: VmRecord) -> pb.Vm:
        # The record first: a crash in between leaves a VM whose domain start() defines.
        self._store.add_vm(record)
        try:
            info = await self._hypervisor.define(spec(record))
        except Exception:
            await self._forget(record)
            raise
        vm = self._describe(record, info)
        self._events.tell(pb.VM_EVENT_KIND_CREATED, vm)
        return vm

    async def _forget(self, record: VmRecord) -> None:
        """Undoes a creation that failed. As long as the domain may be there, the record stays: what is listed can be deleted."""
        try:
            info = await self._hypervisor.info(record.uuid)
            if info is not None:
                await self._hypervisor.undefine(record.uuid)
            self._store.delete_vm(record.uuid)
        except Exception as error:  # noqa: BLE001 - what the creation failed with is told
            log.warning("a VM whose creation failed stays on file: %s", error, extra={"vm": record.uuid})

    async def start_vm(self, uuid: str, *, vm_auth_token: str) -> tuple[pb.Vm, str]:
        """The VM, and the folder of its channel ("" where it travels through the hypervisor).

        A VM that runs already only takes the new token, in the place of the one before: a token ends earlier than many a VM. One that
        runs without a channel, as after a reboot from inside, gets one with the token, where channels travel through the hypervisor.
        Without a token, Refused (VM_STATE_WRONG).
        """
        return await self._to_its_end(self._start(uuid, vm_auth_token))

    async def _start(self, uuid: str, vm_auth_token: str) -> tuple[pb.Vm, str]:
        async with self._lock(uuid):
            record = self._store.vm(uuid)
            if vm_auth_token:
                if record.revoked:
                    raise Refused(Reason.VM_REVOKED, "this VM was revoked on this hypervisor; no token helps")
                check_token(record, vm_auth_token, self._clock())
            if record.arriving or record.leaving:
                info = await self._start_migrated(record, vm_auth_token)
                record = self._store.vm(uuid)
                if record.arriving or info is None or info.state is not DomainState.STOPPED:
                    return self._describe(record, info), ""
            info = await self._hypervisor.info(uuid) or await self._hypervisor.define(spec(record))
            if not bound(record, info):
                raise Refused(
                    Reason.BINDING_MISMATCH, "the domain with this UUID is not the one that was bound to this VMID"
                )
            guest = await self._present_guest(uuid, info)
            if info.state is not DomainState.STOPPED and guest is not None and vm_auth_token:
                return self._replace_token(guest, info, vm_auth_token), self._runs.folder(uuid)
            if info.state is not DomainState.STOPPED and guest is None and vm_auth_token and self._runs.can_attach:
                # It rebooted by itself: the run of its former domain is over, this one is given a run of its own.
                self._store.set_token(uuid, vm_auth_token)
                guest = await self._runs.attach(self._store.vm(uuid), info)
                return self._describe(guest.record, info), self._runs.folder(uuid)
            if info.state is not DomainState.STOPPED:
                how = "already" if guest is not None else "without a channel: give it a token, or stop it first"
                raise Refused(Reason.VM_STATE_WRONG, f"this VM runs {how}")
            await self._runs.end(uuid)
            if vm_auth_token:
                self._store.set_token(uuid, vm_auth_token)
            guest, info = await self._runs.begin(self._store.vm(uuid))
            return self._describe(guest.record, info), self._runs.folder(uuid)

    async def _start_migrated(self, record: VmRecord, vm_auth_token: str) -> DomainInfo | None:
        """A VM that is not, or not yet, simply here takes the token, if it can do something with it. Never is its domain defined here."""
        if vm_auth_token and record.arriving:
            info = await self._migrations.give_token(record, vm_auth_token)
        else:
            info = await self._migrations.settle(record.uuid)
        now = self._store.vm(record.uuid)
        if info is not None and bound(record, info) and info.state is DomainState.STOPPED:
            await self._migrations.require_still(record.uuid)
            self._store.set_here(record.uuid)  # it came, and was stopped
        elif now.leaving or (now.arriving and not vm_auth_token):
            how = "is being migrated" if now.leaving else "is not on this host: it is to come, or has gone"
            raise Refused(Reason.VM_STATE_WRONG, f"this VM {how}")
        return info

    def _replace_token(self, guest: GuestDomain, info: DomainInfo, vm_auth_token: str) -> pb.Vm:
        self._store.set_token(guest.uuid, vm_auth_token)
        guest.record = self._store.vm(guest.uuid)
        self._sessions.renew(guest.uuid)
        guest.identity_changed()
        return self._describe(guest.record, info)

    async def invite_vm(self, uuid: str, *, vm_auth_token: str) -> tuple[pb.Vm, str]:
        """Hands a VM that runs here a new join secret on its own channel, and ends its agent's certificate; as ``start_vm`` returns.

        Refused: VM_REVOKED, TOKEN_MISSING, TOKEN_EXPIRED or TOKEN_INVALID (of the token given, else of the one that it has),
        VM_STATE_WRONG unless it runs here.
        """
        return await self._to_its_end(self._invite(uuid, vm_auth_token))

    async def _invite(self, uuid: str, vm_auth_token: str) -> tuple[pb.Vm, str]:
        async with self._lock(uuid):
            record = self._store.vm(uuid)
            if record.revoked:
                raise Refused(Reason.VM_REVOKED, "this VM was revoked on this hypervisor; no token helps")
            token = vm_auth_token or record.vm_auth_token
            if not token:
                raise Refused(Reason.TOKEN_MISSING, "there is no VM-Auth-Token for this VM")
            check_token(record, token, self._clock())
            if record.arriving or record.leaving:
                raise Refused(Reason.VM_STATE_WRONG, "this VM is not simply here: it comes from another host, or goes")
            info = await self._require_domain(record)
            if info.state is DomainState.STOPPED:
                raise Refused(Reason.VM_STATE_WRONG, "this VM does not run: start it")
            guest = await self._present_guest(uuid, info)
            if guest is not None:
                if vm_auth_token:
                    self._replace_token(guest, info, vm_auth_token)
                await self._runs.invite(guest)
            else:
                # It rebooted by itself, and nobody has given its new domain a channel.
                self._store.set_token(uuid, token)
                guest = await self._runs.attach(self._store.vm(uuid), info)
            return self._describe(guest.record, info), self._runs.folder(uuid)

    async def stop_vm(self, uuid: str, *, force: bool, timeout: float) -> pb.Vm:
        """Ends the run at once; then the domain, which has until the deadline to shut down."""
        return await self._to_its_end(self._stop(uuid, force, timeout))

    async def _stop(self, uuid: str, force: bool, timeout: float) -> pb.Vm:
        async with self._lock(uuid):
            record = self._store.vm(uuid)
            await self._runs.end(uuid)
            info = await self._require_domain(record)
            if info.state is not DomainState.STOPPED:
                if force:
                    await self._hypervisor.destroy(uuid)
                else:
                    await self._hypervisor.shutdown(uuid)
                info = await self._wait_until_stopped(record, timeout)
            return self._describe(record, info)

    async def delete_vm(self, uuid: str) -> tuple[str, ...]:
        """Of a stopped VM: its domain, then its binding. What the hypervisor kept of the domain besides, and is gone, too."""
        return await self._to_its_end(self._delete(uuid))

    async def _delete(self, uuid: str) -> tuple[str, ...]:
        removed: tuple[str, ...] = ()
        async with self._lock(uuid):
            record = self._store.vm(uuid)
            info = await self._hypervisor.info(uuid)
            if info is not None and bound(record, info):
                if info.state is not DomainState.STOPPED:
                    raise Refused(Reason.VM_STATE_WRONG, "this VM runs; stop it first")
                await self._migrations.require_still(uuid)
                removed = await self._hypervisor.undefine(uuid)
            await self._runs.end(uuid)
            self._store.delete_vm(uuid)
        self._locks.pop(uuid, None)
        self._events.tell(pb.VM_EVENT_KIND_DELETED, pb.Vm(uuid=uuid, name=record.name, vmid=record.vmid))
        if removed:
            log.info("a VM was deleted with %s", " and ".join(removed), extra={"vm": uuid})
        return removed

    async def expect_vm(self, untrusted: pb.VmDefinition, *, vm_auth_token: str) -> pb.Vm:
        """A VM is to come from another host; see ``migrations``."""
        record = new_record(
            untrusted,
            authority=self._grid_authority,
            vm_auth_token=vm_auth_token,
            now=self._clock(),
            arriving=True,
        )
        return await self._to_its_end(self._expect(record))

    async def _expect(self, record: VmRecord) -> pb.Vm:
        async with self._lock(record.uuid):
            info = await self._migrations.expect(record)
            vm = self._describe(self._store.vm(record.uuid), info)
        self._events.tell(pb.VM_EVENT_KIND_EXPECTED, vm)
        return vm

    async def migrate_vm(self, uuid: str, destination: str, *, timeout: float) -> pb.Vm:
        """Sends a running VM to another host; see ``migrations``. Unavailable (DEADLINE_EXCEEDED) if it still goes on near the deadline."""
        try:
            async with asyncio.timeout(timeout * 0.95):
                return await self._to_its_end(self._migrate(uuid, destination))
        except TimeoutError:
            raise Unavailable(
                Reason.DEADLINE_EXCEEDED,
                "the migration is not over, and goes on; the state of the VM will tell its end",
            ) from None

    async def _migrate(self, uuid: str, destination: str) -> pb.Vm:
        async with self._lock(uuid):
            info = await self._migrations.send(uuid, destination)
            return self._describe(self._store.vm(uuid), info)

    async def revoke_vm(self, uuid: str) -> pb.Vm:
        """At once and for good. Waits for no lock: a VM that is just being started is revoked all the same.

        Where the disk does not take it, this run of the VM is revoked all the same; Unavailable (STATE_UNAVAILABLE) says that only it is.
        """
        record = replace(self._store.vm(uuid), revoked=True, vm_auth_token="")
        guest = self._runs.guest(uuid)
        if guest is not None:
            guest.record = record
        self._sessions.end(uuid)
        if guest is not None:
            guest.identity_changed()
        self._store.revoke(uuid)
        try:
            vm = self._describe(record, await self._hypervisor.info(uuid))
        except Unavailable:
            # It is done all the same; only whether the domain runs cannot be said now.
            vm = self._unseen(record)
        self._events.tell(pb.VM_EVENT_KIND_REVOKED, vm)
        return vm

    async def ask_hypervisor(self) -> None:
        """One cheap question. Raises Unavailable if it does not answer."""
        await self._hypervisor.list(())

    async def get_vm(self, uuid: str) -> tuple[pb.Vm, pb.VmDefinition]:
        record = self._store.vm(uuid)
        try:
            vm = self._describe(record, await self._hypervisor.info(uuid))
        except Unavailable:
            vm = self._unseen(record)
        return vm, definition(record)

    async def list_vms(self) -> list[pb.Vm]:
        """All, by name; while the hypervisor does not answer in the state UNKNOWN. Callers at the same time share one look at it."""
        if self._listing is None:
            self._listing = asyncio.ensure_future(self._list())
            self._listing.add_done_callback(self._listed)
        return await asyncio.shield(self._listing)

    async def _list(self) -> list[pb.Vm]:
        records = self._store.vms()
        try:
            infos = await self._hypervisor.list({record.uuid for record in records})
        except Unavailable:
            return [self._unseen(record) for record in records]
        domains = {info.uuid: info for info in infos}
        return [self._describe(record, domains.get(record.uuid)) for record in records]

    def _listed(self, listing: asyncio.Task[list[pb.Vm]]) -> None:
        self._listing = None
        if not listing.cancelled():
            listing.exception()  # each caller has been told

    async def secret_used(self, guest: GuestDomain) -> None:
        """An agent of this run presented its join secret, and is about to get its certificate."""
        await self._runs.secret_used(guest)

    def enrolled(self, guest: GuestDomain) -> None:
        """An agent of this run showed its first certificate."""
        info = DomainInfo(guest.uuid, guest.record.name, DomainState.RUNNING, guest.domain_id, guest.record.vmid)
        self._events.tell(pb.VM_EVENT_KIND_ENROLLED, self._describe(guest.record, info))

    # What the hypervisor says.

    def _on_event(self, event: DomainEvent) -> None:
        if event.kind is not DomainEventKind.UNDEFINED:
            self._spawn(self._follow(event))

    def _on_connection(self, connected: bool) -> None:
        # While it is lost, GuestDomain.require_running refuses. Events of that time are lost, so each run is looked at again.
        if connected:
            for guest in self._runs.guests():
                self._spawn(self._look_again(guest.uuid))
            self._spawn(self._settle_all())

    async def _follow(self, event: DomainEvent) -> None:
        try:
            record = self._store.vm(event.uuid)
        except Refused:
            return  # none of our VMs
        info = await self._look_again(event.uuid, taken=event.kind is DomainEventKind.MIGRATED)
        record = self._store.find_vm(event.uuid) or record
        kind = _EVENTS.get(event.kind)
        if kind is not None:
            self._events.tell(kind, self._describe(record, info))

    async def _look_again(self, uuid: str, *, taken: bool = False) -> DomainInfo | None:
        """Brings the run in line with what the hypervisor says now: an event may be old when it comes to its turn.

        ``taken``: it said that the domain went to another host.
        """
        async with self._lock(uuid):
            if self._store.find_vm(uuid) is None:
                return None  # deleted meanwhile
            info = await self._migrations.settle(uuid)
            guest = self._runs.guest(uuid)
            if guest is not None:
                if info is None or info.state is DomainState.STOPPED or info.domain_id != guest.domain_id:
                    await self._runs.end(uuid)
                    log.info("a domain stopped; its channel is gone", extra={"vm": uuid})
                else:
                    guest.set_state(info.state)
            if taken:
                await self._migrations.taken(uuid)
            return info

    async def _settle_later(self, uuid: str) -> None:
        await asyncio.sleep(_SETTLE_POLL)
        await self._look_again(uuid)

    def _migrated(self, what: str, record: VmRecord, info: DomainInfo | None) -> None:
        self._note(what, record)
        self._events.tell(_MIGRATED[what], self._describe(self._store.vm(record.uuid), info))

    async def _to_its_end(self, act: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer of an act that a caller who hangs up does not stop."""
        task = asyncio.ensure_future(act)
        self._acts.add(task)
        task.add_done_callback(self._acted)
        return await asyncio.shield(task)

    def _acted(self, task: asyncio.Task[Any]) -> None:
        self._acts.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.info("an orchestrator's request ended with: %s", task.exception())

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _logged(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except MiddlewareError as error:
            # The connection was lost again; when it is back every run is looked at.
            log.warning("an event could not be followed: %s", error)
        except Exception:
            log.exception("an event could not be followed")

    # Small parts.

    def _lock(self, uuid: str) -> asyncio.Lock:
        return self._locks.setdefault(uuid, asyncio.Lock())

    async def _define_again(self, record: VmRecord) -> None:
        try:
            await self._hypervisor.define(spec(record))
        except Unavailable:
            raise  # of all of them
        except Exception as error:  # noqa: BLE001 - one VM keeps no other from its channel
            log.warning("a VM's domain cannot be defined again: %s", error, extra={"vm": record.uuid})

    async def _require_domain(self, record: VmRecord) -> DomainInfo:
        info = await self._hypervisor.info(record.uuid)
        if info is None:
            return DomainInfo(record.uuid, record.name, DomainState.STOPPED, None, record.vmid)
        if not bound(record, info):
            raise Refused(Reason.BINDING_MISMATCH, "the domain with this UUID is not this VM's")
        return info

    async def _present_guest(self, uuid: str, info: DomainInfo) -> GuestDomain | None:
        """The run of the domain that there is now. One of a domain that is gone, whose event has not come to its turn, is over."""
        guest = self._runs.guest(uuid)
        if guest is not None and guest.domain_id != info.domain_id:
            await self._runs.end(uuid)
            return None
        return guest

    async def _wait_until_stopped(self, record: VmRecord, timeout: float) -> DomainInfo:
        loop = asyncio.get_running_loop()
        # A little before the caller's own deadline, so that it hears how things stand.
        end = loop.time() + timeout * 0.9
        while True:
            info = await self._require_domain(record)
            if info.state is DomainState.STOPPED or loop.time() >= end:
                return info
            await asyncio.sleep(_STOP_POLL)

    def _unseen(self, record: VmRecord) -> pb.Vm:
        """What is on file, while the hypervisor does not answer."""
        vm = self._describe(record, None)
        vm.state = pb.VM_STATE_UNKNOWN
        return vm

    def _describe(self, record: VmRecord, info: DomainInfo | None) -> pb.Vm:
        uuid = record.uuid
        return describe(record, info, self._runs.guest(uuid), self._runs.channel_status(uuid), now=self._clock())
