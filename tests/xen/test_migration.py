"""Two hosts and a grid: a guest goes from one to the other while it runs, and what it may do goes with its token, not with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from secfunet.middleware.v1 import orchestrator_pb2 as pb
from testbed import Testbed
from testbed.guests import own_domain
from tests.xen.audit import Audit
from tests.xen.deployment import GRID, HOST, SECOND_HOST, Release, migration_state
from tests.xen.moving import HOSTS, MIGRATION, NAME, NUMBER, Moving
from tests.xen.orchestrator import Orchestrator, refused
from tests.xen.vm import Vm


@pytest.fixture(scope="module")
def bed(request: pytest.FixtureRequest, release: Release, work: Path) -> Iterator[Testbed]:
    state = request.config.getoption("--state") or migration_state(release, work)
    with Testbed.resume("migration", hosts=HOSTS, state=str(state), guest_disk=release.guest_disk) as made:
        yield made


@pytest.fixture(scope="module")
def orchestrators(bed: Testbed, work: Path) -> Iterator[dict[str, Orchestrator]]:
    with ExitStack() as stack:
        yield {host: stack.enter_context(Orchestrator(bed[host], work)) for host in (HOST, SECOND_HOST)}


@pytest.fixture(scope="module")
def moving(bed: Testbed, orchestrators: dict[str, Orchestrator], work: Path) -> Iterator[Moving]:
    made = Moving.boot(bed, orchestrators, work)
    yield made
    made.vm.guest.hang_up()


def test_a_guest_moves_and_waits_for_its_token(bed: Testbed, moving: Moving) -> None:
    assert moving.vm.guest.kind_inside() == "pvh"
    before, after = Audit(bed[HOST]), Audit(bed[SECOND_HOST])
    assert moving.expect().state == pb.VM_STATE_AWAY
    moving.send()
    assert before.records("vm.left", vm=moving.uuid)
    assert bed[HOST].run(f"xl domid {NAME}", check=False).code != 0
    moving.must_be_the_same()
    arrived = moving.here.get(moving.uuid)
    assert (arrived.state, arrived.enrolled) == (pb.VM_STATE_RUNNING, False)
    moving.vm.must_not_work()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "another hypervisor"):
        moving.here.start(moving.uuid, moving.token_for(HOST))
    assert not after.records("enrol", vm=moving.uuid)
    moving.here.start(moving.uuid, moving.token_for(SECOND_HOST))
    moving.vm.must_work(timeout=900)
    moving.must_be_the_same()
    assert moving.vm.status()["transport"] == "vchan"
    assert after.records("vm.arrived", vm=moving.uuid)
    assert before.is_sound()
    assert after.is_sound()


def test_it_comes_back_to_a_host_that_has_its_token_already(moving: Moving) -> None:
    moving.expect(moving.token_for(moving.elsewhere))
    moving.send()
    moving.vm.must_work(timeout=900)
    moving.must_be_the_same()


def test_a_failed_migration_leaves_it_working(bed: Testbed, moving: Moving) -> None:
    """Over there a domain has its name."""
    there = bed[moving.elsewhere]
    there.run(f"virsh destroy {NAME}; virsh undefine {NAME}", check=False)
    there.write("/root/other.xml", own_domain(NAME, "0e0e0e0e-0000-4000-8000-000000000001", "", "00:16:3e:0e:0e:0e"))
    there.run("virsh define /root/other.xml")
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "goes on here"):
            request = pb.MigrateVmRequest(uuid=moving.uuid, destination=moving.elsewhere)
            moving.here.stub.MigrateVm(request, timeout=MIGRATION)
        moving.vm.must_work(timeout=900)
        moving.must_be_the_same()
    finally:
        there.run(f"virsh undefine {NAME}")


def test_somebody_moves_it_by_hand(bed: Testbed, moving: Moving) -> None:
    """With its channel open, to a host that expects it no longer: it gets nothing there, and its agent notices that nobody answers."""
    moving.there.delete(moving.uuid)
    uri = f"xen+tcp://{bed[moving.elsewhere].address}/system"
    audit = Audit(bed[moving.elsewhere])
    source = moving.host
    command = f"virsh migrate --live --p2p --persistent --undefinesource {NAME} {uri}"
    bed[source].run(command, timeout=MIGRATION)
    moving.wait_until(source, pb.VM_STATE_AWAY)
    moving.follow()
    moving.vm.must_not_work()
    moving.vm.guest.wait_for(
        "journalctl -u secfunet-vm-agent | grep -E 'the channel to dom0 ended' | tail -1", timeout=600
    )
    with refused(grpc.StatusCode.NOT_FOUND):
        moving.here.get(moving.uuid)
    assert not audit.records("enrol", vm=moving.uuid)
    # An orchestrator that knows of it may still say that it belongs there.
    definition = moving.there.stub.GetVm(pb.GetVmRequest(uuid=moving.uuid), timeout=240).definition
    token = moving.token_for(moving.host)
    moving.here.stub.ExpectVm(pb.ExpectVmRequest(definition=definition, vm_auth_token=token), timeout=240)
    moving.vm.must_work(timeout=900)
    moving.must_be_the_same()


def test_the_sources_daemon_is_killed_in_the_middle(bed: Testbed, moving: Moving) -> None:
    """libvirt goes on by itself; the daemon looks, when it is there again."""
    moving.expect(moving.token_for(moving.elsewhere))
    source = moving.host
    call = moving.here.stub.MigrateVm.future(
        pb.MigrateVmRequest(uuid=moving.uuid, destination=moving.elsewhere), timeout=MIGRATION
    )
    bed[source].wait_for(f"virsh domjobinfo {NAME} | grep -q Unbounded", timeout=600)
    bed[source].run("systemctl kill --signal=KILL secure-middleware.service")
    assert call.exception(timeout=600) is not None
    moving.wait_until(source, pb.VM_STATE_AWAY, timeout=MIGRATION)
    moving.follow()
    moving.vm.must_work(timeout=900)
    moving.must_be_the_same()


def test_the_same_vm_on_both_hosts(bed: Testbed, moving: Moving, work: Path) -> None:
    """A second domain with the same VMID where it came from, and a token for there that is older: the grid refuses it its key."""
    old = moving.token_for(moving.elsewhere)
    time.sleep(1)
    moving.here.start(moving.uuid, moving.token_for(moving.host))
    moving.vm.must_work(timeout=900)
    moving.there.delete(moving.uuid)
    second = Vm.make(
        NAME, NUMBER + 1, grid=bed[GRID], host=bed[moving.elsewhere], orchestrator=moving.there, folder=work
    )
    second.token = old
    try:
        second.boot()
        assert "moved to another hypervisor" in str(second.must_not_work())
        moving.vm.must_work()
        # A token that is issued now takes it over: the first domain is the one that has nothing then.
        moving.there.start(second.uuid, moving.token_for(moving.elsewhere))
        second.must_work(timeout=900)
        assert "moved to another hypervisor" in str(moving.vm.must_not_work())
    finally:
        moving.there.stop(second.uuid)
        moving.there.delete(second.uuid)
        second.guest.hang_up()
