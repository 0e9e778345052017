"""Two hosts whose domains reach dom0 over the bridge: a guest goes from one to the other, and to another address for its key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed import Testbed
from tests.xen.audit import Audit
from tests.xen.deployment import HOST, SECOND_HOST, Release, migration_state, pair_inventory, play
from tests.xen.moving import HOSTS, Moving
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import AGENT_STATE

DOM0 = {HOST: "192.168.77.1", SECOND_HOST: "192.168.77.2"}


@pytest.fixture(scope="module")
def bed(release: Release, work: Path) -> Iterator[Testbed]:
    state = migration_state(release, work)
    with Testbed.resume("migration-tcp", hosts=HOSTS, state=state, guest_disk=release.guest_disk) as made:
        listed = pair_inventory(made, release, work, dom0_middleware_channel="tcp")
        for host, address in DOM0.items():
            listed["xen_hosts"]["hosts"][host]["dom0_middleware_bridge_address"] = address
        play(made, "site", listed, work, "--limit", "xen_hosts")
        yield made


@pytest.fixture(scope="module")
def moving(bed: Testbed, work: Path) -> Iterator[Moving]:
    with ExitStack() as stack:
        orchestrators = {host: stack.enter_context(Orchestrator(bed[host], work)) for host in (HOST, SECOND_HOST)}
        made = Moving.boot(bed, orchestrators, work)
        yield made
        made.vm.guest.hang_up()


def kept(moving: Moving) -> dict[str, str]:
    """The enrolment of its agent."""
    found: dict[str, str] = json.loads(moving.vm.guest.run(f"cat {AGENT_STATE}/enrolment.json").stdout)
    return found


def listens(bed: Testbed, host: str, address: str) -> bool:
    """An address of ``host``'s where something listens."""
    _, place, port = address.split(":")
    return place == DOM0[host] and bool(bed[host].run(f"ss -Hltn 'sport = :{port}'").text)


def test_a_guest_moves_and_waits_for_its_token(bed: Testbed, moving: Moving) -> None:
    before, after = Audit(bed[HOST]), Audit(bed[SECOND_HOST])
    first = kept(moving)
    assert moving.vm.status()["transport"] == "tcp"
    assert listens(bed, HOST, first["agent"])
    moving.expect()
    moving.send()
    moving.must_be_the_same()
    assert not listens(bed, HOST, first["agent"])
    assert before.records("vm.left", vm=moving.uuid)
    moving.vm.must_not_work()
    assert not after.records("enrol", vm=moving.uuid)
    moving.here.start(moving.uuid, moving.token_for(SECOND_HOST))
    moving.vm.must_work(timeout=900)
    moving.must_be_the_same()
    second = kept(moving)
    assert second["certificate"] != first["certificate"]
    assert listens(bed, SECOND_HOST, second["agent"])
    assert before.is_sound()
    assert after.is_sound()


def test_it_comes_back_to_a_host_that_has_its_token_already(moving: Moving) -> None:
    moving.expect(moving.token_for(moving.elsewhere))
    moving.send()
    moving.vm.must_work(timeout=900)
    moving.must_be_the_same()
