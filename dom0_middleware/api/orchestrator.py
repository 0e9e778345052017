"""The door for orchestrators: mutual TLS, and a name in the certificate that the settings allow (the guard has seen to both)."""

from __future__ import annotations

import asyncio
import contextlib
import uuid as uuids
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Final

from dom0_middleware.api.guard import peer_certificate, timeout_of
from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.call import Call, current_call
from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable
from dom0_middleware.events import EventHub
from dom0_middleware.orchestrator_authority import Orchestrators, shown_by
from dom0_middleware.status import WORKING, StatusBoard
from dom0_middleware.vm_definition import parse_uuid
from dom0_middleware.vms import Vms
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.middleware.v1 import orchestrator_pb2_grpc
from secfunet.rpc.guard import Context
from secfunet.service.audit import AuditLog

STILL_ADMITTED: Final = 1.0  # seconds between looks whether a watcher may go on


class OrchestratorDoor:
    """``admit`` is for ``Callers``. ``allowed``: the names that may come; it and the certificates on file are asked at each call."""

    def __init__(
        self, orchestrators: Orchestrators, *, allowed: Callable[[], frozenset[str]], clock: Callable[[], float]
    ) -> None:
        self._orchestrators = orchestrators
        self._allowed = allowed
        self._clock = clock

    def admit(self, context: Context, call: Call) -> Call:
        """Raises Refused (CERTIFICATE_REQUIRED, ORCHESTRATOR_NOT_ALLOWED)."""
        name, shown = shown_by(peer_certificate(context))
        admitted = replace(call, caller=name, thumbprint=shown)
        self.require(admitted)
        self._orchestrators.saw(name, shown, now=self._clock())
        return admitted

    def require(self, call: Call) -> None:
        """What was admitted may go on. Raises Refused (ORCHESTRATOR_NOT_ALLOWED)."""
        if call.caller not in self._allowed():
            raise Refused(
                Reason.ORCHESTRATOR_NOT_ALLOWED,
                "this orchestrator is not among the allowed ones",
                detail=f"it is '{call.caller}', certificate {call.thumbprint}",
            )
        self._orchestrators.require_current(call.caller, call.thumbprint, now=self._clock())


class OrchestratorService(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Each call that changes something is one record of the audit log, on file before it is done."""

    def __init__(
        self, vms: Vms, *, events: EventHub, audit: AuditLog, door: OrchestratorDoor, status: StatusBoard
    ) -> None:
        self._vms = vms
        self._door = door
        self._status = status
        self._events = events
        self._audit = audit

    async def CreateVm(self, request: pb.CreateVmRequest, context: Context) -> pb.CreateVmResponse:  # noqa: N802
        # Ours to choose: nobody can ask for the UUID of another; and on record before the VM is there.
        uuid = str(uuids.uuid4())
        with self._recorded(Action.VM_CREATE, uuid, name=request.name):
            vm = await self._vms.create(
                uuid=uuid,
                name=request.name,
                vm_certificate=request.vm_certificate,
                vm_auth_token=request.vm_auth_token,
                memory_mib=request.memory_mib,
                vcpus=request.vcpus,
                address=request.address,
            )
        return pb.CreateVmResponse(vm=vm)

    async def StartVm(self, request: pb.StartVmRequest, context: Context) -> pb.StartVmResponse:  # noqa: N802
        uuid = parse_uuid(request.uuid)
        with self._recorded(Action.VM_START, uuid):
            vm, folder = await self._vms.start_vm(uuid, vm_auth_token=request.vm_auth_token)
        return pb.StartVmResponse(vm=vm, guest_channel=folder)

    async def InviteVm(self, request: pb.InviteVmRequest, context: Context) -> pb.InviteVmResponse:  # noqa: N802
        uuid = parse_uuid(request.uuid)
        detail = "with a token" if request.vm_auth_token else ""
        with self._recorded(Action.VM_INVITE, uuid, detail=detail):
            vm, folder = await self._vms.invite_vm(uuid, vm_auth_token=request.vm_auth_token)
        return pb.InviteVmResponse(vm=vm, guest_channel=folder)

    async def StopVm(self, request: pb.StopVmRequest, context: Context) -> pb.StopVmResponse:  # noqa: N802
        uuid = parse_uuid(request.uuid)
        with self._recorded(Action.VM_STOP, uuid, detail="by force" if request.force else ""):
            vm = await self._vms.stop_vm(uuid, force=request.force, timeout=timeout_of(context))
        return pb.StopVmResponse(vm=vm)

    async def DeleteVm(self, request: pb.DeleteVmRequest, context: Context) -> pb.DeleteVmResponse:  # noqa: N802
        uuid = parse_uuid(request.uuid)
        with self._recorded(Action.VM_DELETE, uuid):
            removed = await self._vms.delete_vm(uuid)
        return pb.DeleteVmResponse(also_removed=removed)

    async def RevokeVm(self, request: pb.RevokeVmRequest, context: Context) -> pb.RevokeVmResponse:  # noqa: N802
        uuid = parse_uuid(request.uuid)
        with self._recorded(Action.VM_REVOKE, uuid):
            vm = await self._vms.revoke_vm(uuid)
        return pb.RevokeVmResponse(vm=vm)

    async def GetVm(self, request: pb.GetVmRequest, context: Context) -> pb.GetVmResponse:  # noqa: N802
        vm, definition = await self._vms.get_vm(parse_uuid(request.uuid))
        return pb.GetVmResponse(vm=vm, definition=definition)

    async def ListVms(self, request: pb.ListVmsRequest, context: Context) -> pb.ListVmsResponse:  # noqa: N802
        return pb.ListVmsResponse(vms=await self._vms.list_vms())

    async def ExpectVm(self, request: pb.ExpectVmRequest, context: Context) -> pb.ExpectVmResponse:  # noqa: N802
        uuid = parse_uuid(request.definition.uuid)
        detail = "with a token" if request.vm_auth_token else ""
        with self._recorded(Action.VM_EXPECT, uuid, name=request.definition.name, detail=detail):
            vm = await self._vms.expect_vm(request.definition, vm_auth_token=request.vm_auth_token)
        return pb.ExpectVmResponse(vm=vm)

    async def MigrateVm(self, request: pb.MigrateVmRequest, context: Context) -> pb.MigrateVmResponse:  # noqa: N802
        uuid = parse_uuid(request.uuid)
        with self._recorded(Action.VM_MIGRATE, uuid, detail=f"to {request.destination[:64]}"):
            vm = await self._vms.migrate_vm(uuid, request.destination, timeout=timeout_of(context))
        return pb.MigrateVmResponse(vm=vm)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        links = await self._status.links()
        works = all(link.state in WORKING for link in links)
        return pb.GetStatusResponse(works=works, links=links, version=version("secfunet"))

    async def WatchEvents(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        call = current_call.get()
        async with contextlib.aclosing(self._events.watch()) as events:
            # Tells the caller that from here on it misses nothing.
            await context.send_initial_metadata(())
            following = _next_of(events)
            try:
                while True:
                    done, _ = await asyncio.wait({following}, timeout=STILL_ADMITTED)
                    # A stream outlives the settings, and the certificate, that it was opened under.
                    self._door.require(call)
                    if done:
                        yield following.result()
                        following = _next_of(events)
            finally:
                following.cancel()
                await asyncio.wait({following})

    @contextlib.contextmanager
    def _recorded(self, action: Action, uuid: str, *, name: str = "", detail: str = "") -> Iterator[None]:
        call = current_call.get()
        permitted = DomainRecord(
            action,
            "permitted",
            correlation=call.correlation,
            caller=call.caller,
            certificate=call.thumbprint,
            vm=uuid,
            name=name[:64],
            detail=detail,
        )
        try:
            self._audit.record(permitted)
            self._audit.flush()
        except Unavailable:
            # Stopping and revoking take rights away: a full disk must not prevent that.
            if action not in (Action.VM_STOP, Action.VM_REVOKE):
                raise
        try:
            yield
        except Exception as error:
            reason = error.reason if isinstance(error, MiddlewareError) else Reason.INTERNAL
            with contextlib.suppress(Unavailable):
                self._audit.record(replace(permitted, decision="failed", reason=str(reason), detail=""))
            raise


def _next_of(events: AsyncGenerator[pb.WatchEventsResponse, None]) -> asyncio.Task[pb.WatchEventsResponse]:
    async def step() -> pb.WatchEventsResponse:
        return await anext(events)

    return asyncio.create_task(step())
