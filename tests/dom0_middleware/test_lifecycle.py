"""The life of VMs: over our API, behind our back, over restarts and lost connections."""

from __future__ import annotations

import asyncio
import contextlib
import uuid as uuids
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import libvirt
import pytest

from dom0_middleware.domain_xml import NAMESPACE, domain_xml
from dom0_middleware.guest import Phase
from dom0_middleware.hypervisor import DomainSpec
from secfunet.identity import thumbprint
from secfunet.middleware.v1 import agent_pb2, orchestrator_pb2
from tests.dom0_middleware.test_access import unary
from tests.dom0_middleware.two_hosts import signs, two_hosts
from tests.dom0_middleware.world import (
    TIMEOUT,
    Guest,
    World,
    certificate,
    eventually,
    facts,
    sign_operation,
    token,
)

pb = orchestrator_pb2


async def refusal(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    code, reason, _ = facts(error.value)
    return code, reason


async def vm(world: World, uuid: str) -> pb.Vm:
    async with world.orchestrator() as stub:
        return (await stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=TIMEOUT)).vm


@contextlib.asynccontextmanager
async def watching(guest: Guest) -> AsyncIterator[asyncio.Task[grpc.StatusCode]]:
    """A WatchIdentity stream under way; the task ends with the status that it ends with."""
    begun = asyncio.Event()

    async def watch() -> grpc.StatusCode:
        async with guest.agent() as stub:
            try:
                async for _ in stub.WatchIdentity(agent_pb2.WatchIdentityRequest()):
                    begun.set()
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    task = asyncio.create_task(watch())
    await asyncio.wait_for(begun.wait(), TIMEOUT)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_create_start_stop_delete(world: World) -> None:
    direct = world.hold_hypervisor()
    uuid = await world.create(memory_mib=64, vcpus=2)
    created = await vm(world, uuid)
    assert created.state == pb.VM_STATE_STOPPED
    assert created.vmid == thumbprint(certificate("web"))
    assert created.authorised_until > 0
    domain = direct.lookupByUUIDString(uuid)
    assert domain.name() == "web"
    assert domain.maxMemory() == 64 * 1024
    assert created.vmid in domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, 0)
    guest = await world.boot(uuid)
    await guest.enrol()
    assert not (await vm(world, uuid)).enrolled  # whether the answer arrived is not known yet
    await guest.show_certificate()
    running = await vm(world, uuid)
    assert (running.state, running.enrolled) == (pb.VM_STATE_RUNNING, True)
    async with world.orchestrator() as stub:
        assert await refusal(stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "VM_STATE_WRONG",
        )
        assert (await refusal(stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
        stopped = (await stub.StopVm(pb.StopVmRequest(uuid=uuid), timeout=TIMEOUT)).vm
        assert (stopped.state, stopped.enrolled) == (pb.VM_STATE_STOPPED, False)
        assert not guest.folder.exists()
        await stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT)
        assert (await refusal(stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=TIMEOUT)))[0] is grpc.StatusCode.NOT_FOUND
        assert list((await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms) == []
    with pytest.raises(libvirt.libvirtError):
        direct.lookupByUUIDString(uuid)


@pytest.mark.parametrize("how", ["api", "api by force", "libvirt destroys", "libvirt shuts down", "delete after stop"])
async def test_everything_ends_with_the_domain(world: World, how: str) -> None:
    guest = await world.enrolled()
    other = await world.enrolled("db")
    async with watching(guest) as watch, guest.agent() as stub:
        await unary(stub)
        session = world.grid.sessions[0]
        direct = world.hold_hypervisor().lookupByUUIDString(guest.uuid)
        if how == "libvirt destroys":
            direct.destroy()
        elif how == "libvirt shuts down":
            direct.shutdown()
        else:
            async with world.orchestrator() as orchestrator:
                force = how == "api by force"
                await orchestrator.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=force), timeout=TIMEOUT)
                if how == "delete after stop":
                    await orchestrator.DeleteVm(pb.DeleteVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
        status = await asyncio.wait_for(watch, 3.0)
        assert status in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
        await eventually(lambda: not guest.folder.exists())
        await eventually(lambda: session.closed)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=1.0)
    assert world.service.sessions.current(guest.uuid) is None
    assert world.service._store.run(guest.uuid) is None
    assert [left.uuid for left in world.service.vms.guests()] == [other.uuid]
    async with other.agent() as stub:
        await unary(stub)


async def test_an_operation_in_flight_dies_with_the_domain(world: World) -> None:
    guest = await world.enrolled()
    world.grid.gate.clear()
    operation = sign_operation()
    async with guest.agent() as stub:
        call = stub.Sign(agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT)
        pending = asyncio.ensure_future(refusal_code(call))
        await eventually(lambda: world.grid.executed)
        world.hold_hypervisor().lookupByUUIDString(guest.uuid).destroy()
        assert await asyncio.wait_for(pending, 3.0) in (
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.FAILED_PRECONDITION,
        )


async def refusal_code(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    return error.value.code()


async def test_a_login_under_way_when_the_domain_stops_leaves_no_session(world: World) -> None:
    guest = await world.boot(await world.create())
    world.grid.login_gate.clear()
    task = asyncio.ensure_future(guest.enrol())
    await eventually(lambda: world.grid.logins == 1)
    world.hold_hypervisor().lookupByUUIDString(guest.uuid).destroy()
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(task, 3.0)
    world.grid.login_gate.set()
    await asyncio.sleep(0.05)
    assert len(world.service.sessions) == 0
    assert all(session.closed for session in world.grid.sessions)


async def test_stopped_and_started_again_behind_our_back_is_another_run(world: World) -> None:
    guest = await world.enrolled()
    domain = world.hold_hypervisor().lookupByUUIDString(guest.uuid)
    domain.destroy()
    domain.create()
    await eventually(lambda: not guest.folder.exists())
    now = await vm(world, guest.uuid)
    # It runs, but no channel was made for it: it has nobody to ask.
    assert (now.state, now.enrolled) == (pb.VM_STATE_RUNNING, False)
    assert world.service.vms.guests() == ()


async def test_an_event_of_the_run_before_does_not_end_this_one(world: World) -> None:
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        for _ in range(5):
            await stub.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
            guest = await world.boot(guest.uuid)
    await asyncio.sleep(0.2)
    await guest.enrol()
    async with guest.agent() as agent:
        await unary(agent)


async def test_names_and_vmids_are_bound_once(world: World) -> None:
    await world.create("web")
    for overrides in ({"name": "web", "vm_certificate": certificate("db")}, {"name": "other"}):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await world.create("web", **{"vm_auth_token": "", **overrides})
        assert facts(error.value)[:2] == (grpc.StatusCode.ALREADY_EXISTS, "VM_EXISTS")
    # A domain that is none of ours has its name, too.
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.create("db", name="test")
    assert facts(error.value)[1] == "VM_EXISTS"
    await world.create("db")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"name": ""}, "REQUEST_INVALID"),
        ({"name": "a" * 65}, "REQUEST_INVALID"),
        ({"name": "a</name><uuid>"}, "REQUEST_INVALID"),
        ({"name": "../../etc"}, "REQUEST_INVALID"),
        ({"vm_certificate": b"no certificate"}, "VM_CERTIFICATE_INVALID"),
        ({"vm_auth_token": "no token"}, "TOKEN_INVALID"),
        ({"vm_auth_token": "db"}, "TOKEN_INVALID"),
        ({"vm_auth_token": "ended"}, "TOKEN_EXPIRED"),
        ({"memory_mib": 1 << 21}, "REQUEST_INVALID"),
        ({"vcpus": 1000}, "REQUEST_INVALID"),
    ],
)
async def test_requests_that_make_no_vm(world: World, overrides: dict[str, object], reason: str) -> None:
    tokens = {"db": token("db"), "ended": token("web", valid=-10)}
    if overrides.get("vm_auth_token") in tokens:
        overrides = {"vm_auth_token": tokens[str(overrides["vm_auth_token"])]}
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.create("web", **overrides)
    assert facts(error.value)[1] == reason
    assert world.service._store.vms() == ()


async def test_the_token_may_come_with_start(world: World) -> None:
    uuid = await world.create(vm_auth_token="")
    async with world.orchestrator() as stub:
        wrong = pb.StartVmRequest(uuid=uuid, vm_auth_token=token("db"))
        assert (await refusal(stub.StartVm(wrong, timeout=TIMEOUT)))[1] == "TOKEN_INVALID"
        right = pb.StartVmRequest(uuid=uuid, vm_auth_token=token("web"))
        assert (await stub.StartVm(right, timeout=TIMEOUT)).vm.authorised_until > 0


async def test_a_running_vm_takes_a_new_token_without_losing_anything(world: World) -> None:
    guest = await world.enrolled("web", vm_auth_token=token("web", operations=frozenset({"decrypt"})))
    operation = sign_operation()
    request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
    async with guest.agent() as stub, world.orchestrator() as orchestrator:
        assert (await refusal(stub.Sign(request, timeout=TIMEOUT)))[1] == "OPERATION_NOT_ALLOWED"
        again = pb.StartVmRequest(uuid=guest.uuid, vm_auth_token=token("web", valid=7200))
        answer = await orchestrator.StartVm(again, timeout=TIMEOUT)
        assert answer.guest_channel == str(guest.folder)
        assert answer.vm.enrolled
        world.grid.gate.clear()
        pending = asyncio.ensure_future(stub.Sign(request, timeout=TIMEOUT))
        await eventually(lambda: world.grid.executed)
        await orchestrator.StartVm(again, timeout=TIMEOUT)  # while an operation is in flight
        world.grid.gate.set()
        await asyncio.wait_for(pending, 3.0)
        await stub.Sign(request, timeout=TIMEOUT)
    await eventually(lambda: [session.closed for session in world.grid.sessions] == [True, True, False])


async def test_revocation_is_at_once_for_good_and_over_restarts(world: World) -> None:
    world.hold_hypervisor()
    guest = await world.enrolled()
    other = await world.enrolled("db")
    async with guest.agent() as stub:
        stream = stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
        first = await stream.read()
        assert list(first.identity.operations)
        session = world.grid.sessions[0]
        world.grid.gate.clear()
        operation = sign_operation()
        request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
        pending = asyncio.ensure_future(refusal(stub.Sign(request, timeout=TIMEOUT)))
        await eventually(lambda: world.grid.executed)
        async with world.orchestrator() as orchestrator:
            revoked = (await orchestrator.RevokeVm(pb.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)).vm
        assert revoked.revoked
        assert revoked.state == pb.VM_STATE_RUNNING
        assert (await asyncio.wait_for(pending, 3.0))[1] == "SESSION_ENDED"
        world.grid.gate.set()
        changed = await asyncio.wait_for(stream.read(), 3.0)
        assert list(changed.identity.operations) == []
        await eventually(lambda: session.closed)
        assert await refusal(stub.Sign(request, timeout=TIMEOUT)) == (grpc.StatusCode.PERMISSION_DENIED, "VM_REVOKED")
        assert (await refusal(stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)))[1] == "VM_REVOKED"
        stream.cancel()
    await world.stop()
    await world.start()
    assert (await vm(world, guest.uuid)).revoked
    async with guest.agent() as stub:
        assert (await refusal(stub.Sign(request, timeout=TIMEOUT)))[1] == "VM_REVOKED"
    async with world.orchestrator() as orchestrator:
        await orchestrator.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
        again = pb.StartVmRequest(uuid=guest.uuid, vm_auth_token=token("web"))
        assert (await refusal(orchestrator.StartVm(again, timeout=TIMEOUT)))[1] == "VM_REVOKED"
    async with other.agent() as stub:
        await unary(stub)


async def test_after_a_restart_without_its_domains_every_vm_is_defined_again_and_stopped(world: World) -> None:
    guest = await world.enrolled()
    await world.stop()
    await world.start()
    found = await vm(world, guest.uuid)
    assert (found.state, found.enrolled, found.name) == (pb.VM_STATE_STOPPED, False, "web")
    assert not guest.folder.exists()
    again = await world.boot(guest.uuid)
    assert again.secret != guest.secret
    await again.enrol()


async def test_a_domain_that_went_on_running_keeps_its_channel(world: World) -> None:
    world.hold_hypervisor()
    guest = await world.enrolled()
    waiting = await world.boot(await world.create("db"))
    await world.stop()
    await world.start()
    async with guest.agent() as stub:
        await unary(stub)
    await waiting.enrol()
    assert (await vm(world, guest.uuid)).enrolled


async def test_a_domain_that_stopped_while_we_were_away_has_lost_its_channel(world: World) -> None:
    direct = world.hold_hypervisor()
    guest, gone = await world.enrolled(), await world.enrolled("db")
    await world.stop()
    direct.lookupByUUIDString(guest.uuid).destroy()
    direct.lookupByUUIDString(guest.uuid).create()  # runs again: but it is another run
    direct.lookupByUUIDString(gone.uuid).destroy()
    await world.start()
    assert not guest.folder.exists()
    assert not gone.folder.exists()
    assert world.service.vms.guests() == ()


async def test_a_lost_connection_heals_and_what_was_missed_is_made_up(world: World) -> None:
    direct = world.hold_hypervisor()
    guest, other = await world.enrolled(), await world.enrolled("db")
    hypervisor = world.service.vms._hypervisor
    opened = libvirt.open
    broken = True

    def refuse(uri: str) -> object:
        if broken:
            raise libvirt.libvirtError("no daemon here")
        return opened(uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libvirt, "open", refuse)
        await asyncio.get_running_loop().run_in_executor(hypervisor._threads, hypervisor._drop)
        hypervisor._connection = _Dead()
        await eventually(lambda: not hypervisor.connected)
        direct.lookupByUUIDString(guest.uuid).destroy()
        async with other.agent() as stub:
            answer = await refusal(stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT))
            assert answer == (grpc.StatusCode.UNAVAILABLE, "HYPERVISOR_UNAVAILABLE")
        async with world.orchestrator() as orchestrator:
            listed = (await orchestrator.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms
            assert {found.state for found in listed} == {pb.VM_STATE_UNKNOWN}
            # Taking a right away needs no hypervisor.
            revoke = pb.RevokeVmRequest(uuid=guest.uuid)
            revoked = (await orchestrator.RevokeVm(revoke, timeout=TIMEOUT)).vm
            assert (revoked.revoked, revoked.state) == (True, pb.VM_STATE_UNKNOWN)
        assert guest.folder.exists()
        broken = False
        await eventually(lambda: hypervisor.connected)
    await eventually(lambda: not guest.folder.exists())
    async with other.agent() as stub:
        await unary(stub)
    # And events come again.
    direct.lookupByUUIDString(other.uuid).destroy()
    await eventually(lambda: not other.folder.exists())


class _Dead:
    """A connection of which only the death is left."""

    def isAlive(self) -> int:  # noqa: N802 - libvirt's name
        return 0

    def __getattr__(self, name: str) -> object:
        raise libvirt.libvirtError("the connection is closed")


async def test_same_name_other_uuid_is_another_domain(world: World) -> None:
    direct = world.hold_hypervisor()
    uuid = await world.create()
    direct.lookupByUUIDString(uuid).undefine()
    impostor = str(uuids.uuid4())
    spec = DomainSpec(impostor, "web", thumbprint(certificate("web")), 64, 1)
    domain = direct.defineXML(domain_xml(spec, domain_type="test"))
    domain.create()
    await asyncio.sleep(0.1)
    assert (await vm(world, uuid)).state == pb.VM_STATE_STOPPED
    assert world.service.vms.guests() == ()
    async with world.orchestrator() as stub:
        assert (await refusal(stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT)))[1] == "VM_EXISTS"
        stranger = stub.StartVm(pb.StartVmRequest(uuid=impostor), timeout=TIMEOUT)
        assert (await refusal(stranger))[1] == "VM_UNKNOWN"


@pytest.mark.parametrize(("name", "vmid"), [("other", "same"), ("web", "of db"), ("web", "none")])
async def test_a_uuid_taken_over_by_another_domain_starts_nothing(world: World, name: str, vmid: str) -> None:
    direct = world.hold_hypervisor()
    uuid = await world.create()
    direct.lookupByUUIDString(uuid).undefine()
    bound = {"same": thumbprint(certificate("web")), "of db": thumbprint(certificate("db")), "none": "x"}[vmid]
    direct.defineXML(domain_xml(DomainSpec(uuid, name, bound, 64, 1), domain_type="test"))
    async with world.orchestrator() as stub:
        assert (await refusal(stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT)))[1] == "BINDING_MISMATCH"
        direct.lookupByUUIDString(uuid).create()
        await asyncio.sleep(0.1)
        assert world.service.vms.guests() == ()
        # Nor is the other one's domain ours to stop.
        stop = stub.StopVm(pb.StopVmRequest(uuid=uuid, force=True), timeout=TIMEOUT)
        assert (await refusal(stop))[1] == "BINDING_MISMATCH"
    assert direct.lookupByUUIDString(uuid).isActive()


async def test_events_are_told_in_order(world: World) -> None:
    seen: list[tuple[int, str]] = []
    async with world.orchestrator() as stub:
        call = stub.WatchEvents(pb.WatchEventsRequest())
        await call.initial_metadata()

        async def collect() -> None:
            async for event in call:
                assert event.time > 0
                seen.append((event.kind, event.vm.name))

        task = asyncio.create_task(collect())
        guest = await world.enrolled()
        domain = world.hold_hypervisor().lookupByUUIDString(guest.uuid)
        domain.suspend()
        domain.resume()
        await stub.RevokeVm(pb.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
        await asyncio.sleep(0.1)
        await stub.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
        await eventually(lambda: len(seen) >= 7)
        await stub.DeleteVm(pb.DeleteVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
        await eventually(lambda: len(seen) >= 8)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    kinds = [kind for kind, _ in seen]
    assert kinds[0] == pb.VM_EVENT_KIND_CREATED
    assert kinds[-1] == pb.VM_EVENT_KIND_DELETED
    assert kinds.index(pb.VM_EVENT_KIND_STARTED) < kinds.index(pb.VM_EVENT_KIND_SUSPENDED)
    assert kinds.index(pb.VM_EVENT_KIND_SUSPENDED) < kinds.index(pb.VM_EVENT_KIND_RESUMED)
    assert kinds.index(pb.VM_EVENT_KIND_REVOKED) < kinds.index(pb.VM_EVENT_KIND_STOPPED)
    assert pb.VM_EVENT_KIND_ENROLLED in kinds
    assert {name for _, name in seen} == {"web"}


async def test_orchestrators_calls_are_recorded_with_their_name(world: World) -> None:
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        await refusal(stub.DeleteVm(pb.DeleteVmRequest(uuid=guest.uuid), timeout=TIMEOUT))
    records = [r for r in world.audit() if str(r["action"]).startswith("vm.")]
    assert [(r["action"], r["decision"], r["caller"]) for r in records] == [
        ("vm.create", "permitted", "admin"),
        ("vm.start", "permitted", "admin"),
        ("vm.delete", "permitted", "admin"),
        ("vm.delete", "failed", "admin"),
    ]
    assert {r["vm"] for r in records} == {guest.uuid}


async def test_a_domain_that_rebooted_by_itself_has_nothing_until_a_token_gives_it_a_channel() -> None:
    async with two_hosts() as hosts:
        host, uuid = hosts.a, await hosts.running()
        async with hosts.agent(uuid) as agent:
            assert await signs(agent, host)
            before = host.hypervisor.domains[uuid].number
            host.hypervisor.reboot_guest(uuid)
            await eventually(lambda: not host.world.service.vms.guests())
            assert host.hypervisor.domains[uuid].number != before
            with pytest.raises(grpc.aio.AioRpcError, match="without a channel"):
                await host.start(uuid)
            assert not (await host.vm(uuid)).enrolled
            await host.start(uuid, host.token())
            assert await signs(agent, host)


@pytest.mark.parametrize("how", ["invite", "start"])
async def test_a_domain_that_rebooted_a_moment_ago_gets_a_run_of_its_own(how: str) -> None:
    """The orchestrator is faster than the event: the run of the domain that is gone ends all the same, with all that it had."""
    async with two_hosts() as hosts:
        host, uuid = hosts.a, await hosts.running()
        before = host.world.service.vms.guests()[0]
        host.channel.closed.clear()
        host.hypervisor.reboot_guest(uuid, tell=False)
        async with host.world.orchestrator() as stub:
            if how == "invite":
                await stub.InviteVm(pb.InviteVmRequest(uuid=uuid), timeout=TIMEOUT)
            else:
                await stub.StartVm(pb.StartVmRequest(uuid=uuid, vm_auth_token=host.token()), timeout=TIMEOUT)
        (now,) = host.world.service.vms.guests()
        assert now is not before
        assert before.phase is Phase.ENDED
        assert host.channel.closed == [(uuid, 0.0)]
        async with hosts.agent(uuid) as agent:
            assert await signs(agent, host)
