"""What ends with a domain: one that is destroyed, crashes, reboots, shuts down, is renamed, or has a copy in its place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import grpc
import pytest

from secfunet.xen import home
from testbed import Testbed
from testbed.guests import Guest, own_domain
from tests.xen.attacks import CALL_WITH, attack
from tests.xen.audit import Audit
from tests.xen.deployment import GRID, HOST
from tests.xen.orchestrator import Orchestrator, refused
from tests.xen.vm import AGENT_STATE, Vm, issue_token


@pytest.fixture(scope="module")
def web(make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("web", 21)
    vm.boot()
    return vm


def test_suspend_and_resume(bed: Testbed, web: Vm) -> None:
    host = bed[HOST]
    host.run("virsh -c xen:///system suspend web")
    deadline = time.monotonic() + 60
    while web.orchestrator.get(web.uuid).state != 3:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    host.run("virsh -c xen:///system resume web")
    web.must_work()


def test_a_domain_that_is_destroyed_takes_its_certificate_with_it(bed: Testbed, web: Vm) -> None:
    audit = Audit(bed[HOST])
    kept = web.guest.run(f"cat {AGENT_STATE}/enrolment.json").stdout
    web.guest.hang_up()
    bed[HOST].run("virsh -c xen:///system destroy web")  # behind the middleware's back
    web.orchestrator.wait_until_enrolled(web.uuid, enrolled=False)
    web.boot()
    answer = attack(web.guest, CALL_WITH, f"unix:{AGENT_STATE}/c/agent", "60", data=kept)
    assert answer["code"] == "UNAUTHENTICATED"
    assert audit.records(decision="refused", vm=web.uuid, reason="CERTIFICATE_NOT_CURRENT")
    web.must_work()


def test_a_guest_that_crashes_ends_its_run(web: Vm) -> None:
    web.guest.run("nohup sh -c 'sleep 1; echo c >/proc/sysrq-trigger' >/dev/null 2>&1 &")
    web.guest.hang_up()
    web.orchestrator.wait_until_enrolled(web.uuid, enrolled=False)
    web.guest.wait_until_gone()


def test_a_domain_that_is_paused_while_it_enrols_does_so_when_it_goes_on(bed: Testbed, web: Vm) -> None:
    """dom0 has taken its secret, and waits for the grid before it answers."""
    audit = Audit(bed[HOST])
    web.orchestrator.start(web.uuid, web.token)
    audit.wait_for("enrol", then="virsh -c xen:///system suspend web")
    bed[HOST].run("virsh -c xen:///system resume web")
    web.guest.wait_until_ready()
    web.orchestrator.wait_until_enrolled(web.uuid)
    web.must_work()


def test_a_guest_that_reboots_gets_nothing_until_it_is_given_again(bed: Testbed, web: Vm) -> None:
    before = web.guest.domain_id
    web.guest.run("nohup sh -c 'sleep 1; systemctl reboot' >/dev/null 2>&1 &")
    web.guest.hang_up()
    bed[HOST].wait_for(f"now=$(xl domid web) && [ $now != {before} ]", timeout=600)
    web.guest.wait_until_ready()
    assert not web.orchestrator.get(web.uuid).enrolled
    web.must_not_work()
    web.orchestrator.start(web.uuid, web.token)
    web.orchestrator.wait_until_enrolled(web.uuid)
    web.must_work()


def test_a_shutdown_from_inside_ends_the_run(web: Vm) -> None:
    web.guest.run("nohup sh -c 'sleep 1; systemctl poweroff' >/dev/null 2>&1 &")
    web.guest.hang_up()
    web.orchestrator.wait_until_enrolled(web.uuid, enrolled=False)
    web.guest.wait_until_gone()


def test_a_domain_that_was_renamed_is_not_started(bed: Testbed, web: Vm, orchestrator: Orchestrator) -> None:
    host = bed[HOST]
    original = host.run("virsh -c xen:///system dumpxml --inactive web").stdout
    host.run("virsh -c xen:///system undefine web")
    host.write("/run/renamed.xml", original.replace(b"<name>web</name>", b"<name>db2</name>"))
    host.run("virsh -c xen:///system define /run/renamed.xml")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not the one"):
        orchestrator.start(web.uuid, web.token)
    host.run("virsh -c xen:///system undefine db2")
    host.write("/run/web.xml", original)
    host.run("virsh -c xen:///system define /run/web.xml")


def test_a_copy_of_the_image_and_a_domain_of_the_same_name_get_nothing(
    bed: Testbed, web: Vm, orchestrator: Orchestrator
) -> None:
    """web's own disk and name, another UUID: started by hand in web's place, outside the middleware."""
    host = bed[HOST]
    original = host.run("virsh -c xen:///system dumpxml --inactive web").stdout
    host.run("virsh -c xen:///system undefine web")
    other = "0f0f0f0f-7e57-4bed-8000-000000000001"
    host.write("/run/copy.xml", own_domain("web", other, "192.168.77.29", "00:16:3e:aa:bb:cc", memory_mib=224))
    copy = Guest(host, "web", "192.168.77.29")
    try:
        host.run("virsh -c xen:///system create /run/copy.xml")
        copy.wait_until_ready()
        with refused(grpc.StatusCode.ALREADY_EXISTS, "already has a domain"):
            orchestrator.start(web.uuid, issue_token(bed[GRID], "web", HOST))
        assert host.run(f"xenstore-ls {home(copy.domain_id)}/secfunet", check=False).code != 0
        said = copy.run("echo hello | vm-agent sign - --timeout 5 --out /run/sig", check=False)
        assert said.code != 0
        assert b"Traceback" not in said.stderr
        assert json.loads(copy.run("vm-agent status --json", check=False).stdout)["enrolled"] is False
    finally:
        copy.hang_up()
        host.run("virsh -c xen:///system destroy web", check=False)
    host.write("/run/web.xml", original)
    host.run("virsh -c xen:///system define /run/web.xml")
    web.boot()
    web.must_work()


def test_the_audit_log_is_sound(bed: Testbed, web: Vm) -> None:
    assert Audit(bed[HOST]).is_sound()
