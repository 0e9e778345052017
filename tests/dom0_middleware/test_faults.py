"""What the middleware leans on fails at every step of a VM's life: nothing leaks, and what is half made heals or is told."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import grpc.aio
import libvirt
import pytest

from dom0_middleware.api import guard
from dom0_middleware.errors import Reason, Refused, Unavailable
from dom0_middleware.hypervisor import DomainState
from dom0_middleware.libvirt_hypervisor import LibvirtHypervisor, _info
from dom0_middleware.refusals import RefusalMeter
from dom0_middleware.settings import MiddlewareSettings
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc, orchestrator_pb2
from secfunet.service.settings import SettingsError
from tests.dom0_middleware.test_lifecycle import refusal, vm
from tests.dom0_middleware.world import TIMEOUT, World, certificate, eventually, running_world, token

pb = orchestrator_pb2
UNAVAILABLE = Unavailable(Reason.HYPERVISOR_UNAVAILABLE, "injected", retry_after=1.0)
REFUSED = Refused(Reason.LIBVIRT_REFUSED, "injected")


class FaultyHypervisor:
    """The real one, whose ``method`` fails: before it did anything, or after it did it all (the answer was lost)."""

    def __init__(self) -> None:
        self._real = LibvirtHypervisor("test:///default", heal_interval=0.1)
        self.method, self.when, self.error = "", "", UNAVAILABLE

    def fail(self, method: str, when: str = "before", error: Any = UNAVAILABLE) -> None:
        self.method, self.when, self.error = method, when, error

    def heal(self) -> None:
        self.method = ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name != self.method:
            return real

        async def faulty(*arguments: Any) -> Any:
            if self.when == "after":
                await real(*arguments)
            raise self.error

        return faulty


@contextlib.asynccontextmanager
async def faulty_world() -> AsyncIterator[tuple[World, FaultyHypervisor]]:
    async with running_world() as world:
        await world.stop()
        world.hold_hypervisor()
        faulty = FaultyHypervisor()
        world.parts = {"hypervisor": faulty}
        await world.start()
        yield world, faulty


def nothing_leaked(world: World, uuid: str) -> None:
    """No channel, no join information, no run and no secret of this VM."""
    assert not list((world.state / "guests").iterdir())
    assert world.service.vms.guests() == ()
    with contextlib.closing(sqlite3.connect(world.state / "state.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM runs WHERE uuid=?", (uuid,)).fetchone() == (0,)


async def whole_life(world: World) -> None:
    """A VM of this name can be made, used and removed."""
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        await stub.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
        await stub.DeleteVm(pb.DeleteVmRequest(uuid=guest.uuid), timeout=TIMEOUT)


@pytest.mark.parametrize("error", [UNAVAILABLE, REFUSED], ids=["unavailable", "refused"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_definition_that_fails_leaves_no_orphan(when: str, error: Exception) -> None:
    async with faulty_world() as (world, hypervisor):
        hypervisor.fail("define", when, error)
        with pytest.raises(grpc.aio.AioRpcError):
            await world.create()
        hypervisor.heal()
        assert [d.name() for d in world.hold_hypervisor().listAllDomains() if d.name() != "test"] == []
        await whole_life(world)


async def test_a_definition_that_cannot_be_undone_is_told_and_can_be_deleted() -> None:
    async with faulty_world() as (world, hypervisor):

        async def lost(spec: Any) -> None:
            await hypervisor._real.define(spec)
            hypervisor.fail("info")
            raise UNAVAILABLE

        hypervisor.define = lost  # type: ignore[attr-defined]
        with pytest.raises(grpc.aio.AioRpcError):
            await world.create()
        hypervisor.heal()
        del hypervisor.define  # type: ignore[attr-defined]
        async with world.orchestrator() as stub:
            (listed,) = (await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms
            assert (listed.name, listed.state) == ("web", pb.VM_STATE_STOPPED)
            await stub.DeleteVm(pb.DeleteVmRequest(uuid=listed.uuid), timeout=TIMEOUT)
        await whole_life(world)


@pytest.mark.parametrize("error", [UNAVAILABLE, REFUSED], ids=["unavailable", "refused"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_boot_that_fails_leaves_no_channel_no_secret_and_no_domain(when: str, error: Exception) -> None:
    async with faulty_world() as (world, hypervisor):
        uuid = await world.create()
        hypervisor.fail("create", when, error)
        async with world.orchestrator() as stub:
            await refusal(stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT))
        nothing_leaked(world, uuid)
        hypervisor.heal()
        assert (await vm(world, uuid)).state == pb.VM_STATE_STOPPED
        await (await world.boot(uuid)).enrol()


async def test_a_boot_whose_domain_cannot_be_stopped_again_is_told() -> None:
    async with faulty_world() as (world, hypervisor):
        uuid = await world.create()
        hypervisor.fail("destroy")
        world.service.vms._runs._store.set_domain_id = _full  # type: ignore[method-assign]
        async with world.orchestrator() as stub:
            assert (await refusal(stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT)))[
                1
            ] == "STATE_UNAVAILABLE"
            nothing_leaked(world, uuid)
            found = await vm(world, uuid)
            assert (found.state, found.enrolled) == (pb.VM_STATE_RUNNING, False)
            with pytest.raises(grpc.aio.AioRpcError, match="without a channel"):
                await stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT)
            hypervisor.heal()
            del world.service.vms._runs._store.set_domain_id  # type: ignore[method-assign]
            await stub.StopVm(pb.StopVmRequest(uuid=uuid, force=True), timeout=TIMEOUT)
        await (await world.boot(uuid)).enrol()


def _full(*_: object) -> None:
    raise Unavailable(Reason.STATE_UNAVAILABLE, "injected")


@pytest.mark.parametrize("method", ["shutdown", "destroy", "info"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_stop_that_fails_has_taken_the_rights_all_the_same(method: str, when: str) -> None:
    async with faulty_world() as (world, hypervisor):
        guest = await world.enrolled()
        hypervisor.fail(method, when)
        async with world.orchestrator() as stub:
            request = pb.StopVmRequest(uuid=guest.uuid, force=method == "destroy")
            await refusal(stub.StopVm(request, timeout=TIMEOUT))
            nothing_leaked(world, guest.uuid)
            hypervisor.heal()
            stopped = await stub.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
            assert stopped.vm.state == pb.VM_STATE_STOPPED


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_deletion_that_fails_can_be_repeated(when: str) -> None:
    async with faulty_world() as (world, hypervisor):
        uuid = await world.create()
        hypervisor.fail("undefine", when)
        async with world.orchestrator() as stub:
            await refusal(stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT))
            hypervisor.heal()
            await stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT)
        await whole_life(world)


async def test_a_caller_that_hangs_up_leaves_no_half_started_vm() -> None:
    async with faulty_world() as (world, hypervisor):
        uuid = await world.create()
        booting, go_on = asyncio.Event(), asyncio.Event()

        async def slow(which: str) -> Any:
            booting.set()
            await go_on.wait()
            return await hypervisor._real.create(which)

        hypervisor.create = slow  # type: ignore[attr-defined]
        async with world.orchestrator() as stub:
            call = stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT)
            task = asyncio.ensure_future(_answer(call))
            await asyncio.wait_for(booting.wait(), TIMEOUT)
            call.cancel()
            await asyncio.gather(task, return_exceptions=True)
            go_on.set()
            await eventually(lambda: [g.domain_id for g in world.service.vms.guests() if g.domain_id is not None])
        assert (world.state / "guests" / uuid / "join.json").exists()
        assert (await vm(world, uuid)).state == pb.VM_STATE_RUNNING


async def _answer(call: Any) -> Any:
    return await call


# A full disk, for the state file.


@contextlib.contextmanager
def full_state(world: World) -> Any:
    """SQLite itself refuses every write, as it does when the disk is full."""
    db = world.service._store._db
    db.execute("PRAGMA query_only=ON")
    try:
        yield
    finally:
        db.execute("PRAGMA query_only=OFF")


async def test_a_full_disk_starts_nothing_and_says_so(world: World) -> None:
    uuid = await world.create()
    async with world.orchestrator() as stub:
        with full_state(world):
            request = pb.CreateVmRequest(name="db", vm_certificate=certificate("db"), vm_auth_token=token("db"))
            for call in (
                stub.CreateVm(request, timeout=TIMEOUT),
                stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT),
                stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT),
            ):
                assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, "STATE_UNAVAILABLE")
        nothing_leaked(world, uuid)
        assert [r["reason"] for r in world.audit() if r["decision"] == "failed"] == ["STATE_UNAVAILABLE"] * 3
        await (await world.boot(uuid)).enrol()


async def test_a_full_disk_takes_no_rights_end_away(world: World) -> None:
    """The channel and the certificate go, and the VM is revoked for as long as this daemon lives."""
    guest, other = await world.enrolled(), await world.enrolled("db")
    async with world.orchestrator() as stub:
        with full_state(world):
            assert (await refusal(stub.RevokeVm(pb.RevokeVmRequest(uuid=other.uuid), timeout=TIMEOUT)))[1] == (
                "STATE_UNAVAILABLE"
            )
            (still,) = [g for g in world.service.vms.guests() if g.uuid == other.uuid]
            assert still.record.revoked
            await stub.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
            assert not guest.folder.exists()
    # What stayed on file is no run any more for the next daemon, either.
    await world.stop()
    await world.start()
    assert guest.uuid not in [g.uuid for g in world.service.vms.guests()]


async def test_a_secret_cannot_be_tried_while_attempts_cannot_be_counted(world: World) -> None:
    guest = await world.boot(await world.create())
    with full_state(world):
        for _ in range(8):
            assert (await refusal(guest.enrol(b"wrong")))[1] == "STATE_UNAVAILABLE"
        assert (await refusal(guest.enrol()))[1] == "STATE_UNAVAILABLE"
    await guest.enrol()


async def test_revoking_and_stopping_need_no_room_in_the_audit_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, other = await world.enrolled(), await world.enrolled("db")

    def full(*_: object, **__: object) -> None:
        raise Unavailable(Reason.AUDIT_UNAVAILABLE, "injected")

    monkeypatch.setattr(world.service.audit, "record", full)
    async with world.orchestrator() as stub:
        assert (await refusal(stub.StartVm(pb.StartVmRequest(uuid=guest.uuid), timeout=TIMEOUT)))[
            1
        ] == "AUDIT_UNAVAILABLE"
        revoked = await stub.RevokeVm(pb.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
        assert revoked.vm.revoked
        await stub.StopVm(pb.StopVmRequest(uuid=other.uuid, force=True), timeout=TIMEOUT)
    assert not other.folder.exists()
    world.service.reload()
    monkeypatch.undo()


# Restarts, folders, settings.


async def test_what_one_guest_leaves_in_its_folder_does_not_stop_the_daemon(world: World) -> None:
    world.hold_hypervisor()
    guest, other = await world.enrolled(), await world.enrolled("db")
    await world.stop()
    for name in ("agent.sock", "other.sock"):
        path = guest.folder / name
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "inside").write_text("x")
    (guest.folder / "link.sock").symlink_to(world.state)
    await world.start()
    assert (world.state / "guest-authority.key").exists()
    assert {g.uuid for g in world.service.vms.guests()} == {guest.uuid, other.uuid}
    async with other.agent() as stub:
        await _identity(stub)


async def _identity(stub: agent_pb2_grpc.AgentServiceAsyncStub) -> None:
    await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)


async def test_a_run_of_an_earlier_boot_of_the_host_is_over(world: World) -> None:
    """After a power cut a domain that the host started by itself may have the number of the run before."""
    world.hold_hypervisor()
    guest = await world.enrolled()
    await world.stop()
    await world.start()
    async with guest.agent() as stub:
        await _identity(stub)
    await world.stop()
    world.parts = {"boot_id": "another"}
    await world.start()
    nothing_leaked(world, guest.uuid)
    async with world.orchestrator() as stub:
        await stub.StopVm(pb.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
    await (await world.boot(guest.uuid)).enrol()


async def test_who_may_command_is_read_again(world: World) -> None:
    await world.stop()
    names: list[Any] = [("admin",), ("stranger",), SettingsError(Path("c.toml"), ["broken"]), ("admin",)]

    def again() -> MiddlewareSettings:
        if isinstance(names[0], Exception):
            raise names[0]
        settings = world.settings
        orchestrators = settings.orchestrators.model_copy(update={"allowed": names[0]})
        return settings.model_copy(update={"orchestrators": orchestrators})

    world.parts = {"read_again": again}
    await world.start()

    async def may(name: str) -> bool:
        async with world.orchestrator(name) as stub:
            try:
                await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
                    raise
                return False
            return True

    async with world.orchestrator() as stub:
        watch = stub.WatchEvents(pb.WatchEventsRequest())
        await watch.initial_metadata()
        assert (await may("admin"), await may("stranger")) == (True, False)
        for expected in ((False, True), (False, False), (True, False)):
            names.pop(0)
            world.service.reload()
            assert (await may("admin"), await may("stranger")) == expected
            if expected == (False, True):
                # A stream that was opened before tells nothing more.
                world.service.events.tell(pb.VM_EVENT_KIND_CREATED, pb.Vm(name="x"))
                with pytest.raises(grpc.aio.AioRpcError, match="not among the allowed"):
                    await watch.read()
    read = [r["detail"] for r in world.audit() if r["action"] == "orchestrators.read"]
    assert read == ["stranger", "nobody", "admin"]


async def test_a_strangers_flood_is_bounded_in_the_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.stop()
    monkeypatch.setattr(guard, "RefusalMeter", partial(RefusalMeter, burst=5.0, per_second=0.001))
    await world.start()
    async with world.orchestrator("stranger") as stub:
        for _ in range(50):
            await refusal(stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT))
    assert len([r for r in world.audit() if r.get("reason") == "ORCHESTRATOR_NOT_ALLOWED"]) == 5


async def test_clocks_that_jump_open_nothing(world: World) -> None:
    """Forward: the certificate has ended; back again: it is current again, and only this run's."""
    guest = await world.enrolled()
    world.clock_offset = 7200
    async with guest.agent() as stub:
        assert (await refusal(_identity(stub)))[1] == "CERTIFICATE_EXPIRED"
    world.clock_offset = -7200
    async with guest.agent() as stub:
        await _identity(stub)
    world.clock_offset = 0
    async with guest.agent() as stub:
        await _identity(stub)


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (libvirt.VIR_DOMAIN_PAUSED_USER, DomainState.PAUSED),
        (libvirt.VIR_DOMAIN_PAUSED_UNKNOWN, DomainState.PAUSED),
        (libvirt.VIR_DOMAIN_PAUSED_MIGRATION, DomainState.RUNNING),
    ],
)
def test_a_domain_that_could_not_be_sent_runs_whatever_libvirt_says(reason: int, state: DomainState) -> None:
    """The libxl driver calls it paused for good, and a resume of what is not paused fails; seen on Xen 4.17 with libvirt 9.0."""
    domain = Mock()
    domain.state.return_value = [libvirt.VIR_DOMAIN_PAUSED, reason]
    domain.ID.return_value = 7
    domain.metadata.side_effect = libvirt.libvirtError("none")
    assert _info(domain).state is state
