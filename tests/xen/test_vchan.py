"""Over vchan: two guests, PVH and PV, use their keys; what a neighbour tries."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from secfunet.xen import JOIN_PATH, VCHAN_PATH, home
from testbed import Testbed
from testbed.guests import domain_template
from tests.xen.attacks import CALL_WITH, ENROL_WITH, MAP_GRANTS, OPEN_VCHAN, READ_XENSTORE, attack
from tests.xen.audit import Audit
from tests.xen.deployment import HOST
from tests.xen.vm import AGENT_STATE, Vm

TEMPLATE = "/etc/secfunet/middleware/domain.xml"
EACCES = 13


def set_kind(bed: Testbed, kind: str) -> None:
    """Domains that are created from now on are of another kind."""
    bed[HOST].write(TEMPLATE, domain_template(kind=kind))
    bed[HOST].run("systemctl restart secure-middleware.service")


@pytest.fixture(scope="module")
def web(make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("web", 21)
    vm.boot()
    return vm


@pytest.fixture(scope="module")
def db(bed: Testbed, web: Vm, make_vm: Callable[..., Vm]) -> Vm:
    set_kind(bed, "pv")
    vm = make_vm("db", 22)
    vm.boot()
    return vm


def test_a_pvh_guest_signs_and_decrypts(web: Vm) -> None:
    web.must_work()
    assert web.guest.kind_inside() == "pvh"
    status = web.status()
    assert (status["enrolled"], status["connected"], status["transport"]) == (True, True, "vchan")


def test_a_pv_guest_signs_and_decrypts(db: Vm, web: Vm) -> None:
    db.must_work()
    assert db.guest.kind_inside() == "pv"
    web.must_work()


def test_a_neighbour_cannot_open_the_others_vchan(web: Vm, db: Vm) -> None:
    """Xen refuses it, before dom0 hears of it: the names are not readable, and no page that dom0 granted to web can be mapped."""
    foreign = f"{home(web.guest.domain_id)}/{VCHAN_PATH}"
    assert attack(db.guest, OPEN_VCHAN, foreign)["errno"] == EACCES
    grants = attack(db.guest, MAP_GRANTS, "8", "512")
    # Those of its own channel, its console, disk and network backends are the other way round: dom0 maps them.
    own = attack(web.guest, MAP_GRANTS, "8", "512")
    assert own["mapped"], "the control found no page of the channel"
    assert not set(grants["mapped"]) & set(own["mapped"])
    web.must_work()


def test_a_neighbour_cannot_read_the_others_join_secret(bed: Testbed, web: Vm, db: Vm) -> None:
    host, domain = bed[HOST], web.guest.domain_id
    path = f"{home(domain)}/{JOIN_PATH}"
    # It was used and is gone; so that there is something to read, dom0 writes as it does for a new run.
    host.run(
        f"/opt/secfunet/current/bin/python3 -c 'from secfunet.xen.xenstore import Xenstore; "
        f'Xenstore().write("{path}", b"x" * 40, readers=({domain},))\''
    )
    try:
        assert attack(web.guest, READ_XENSTORE, path, JOIN_PATH) == {path: 40, JOIN_PATH: 40}
        assert attack(db.guest, READ_XENSTORE, path, JOIN_PATH) == {path: {"errno": EACCES}, JOIN_PATH: None}
    finally:
        host.run(f"xenstore-rm {path}")


def test_a_neighbour_with_the_others_certificate_is_refused_and_recorded(bed: Testbed, web: Vm, db: Vm) -> None:
    audit = Audit(bed[HOST])
    stolen = web.guest.run(f"cat {AGENT_STATE}/enrolment.json").stdout
    answer = attack(db.guest, CALL_WITH, f"unix:{AGENT_STATE}/c/agent", "60", data=stolen)
    assert answer["code"] == "PERMISSION_DENIED"
    assert "another domain" in answer["details"]
    assert audit.records(decision="refused", vm=db.uuid, reason="CERTIFICATE_FOREIGN")
    web.must_work()


def test_a_join_secret_is_in_xenstore_alone_of_no_use_to_a_neighbour_and_gone_once_used(
    bed: Testbed, web: Vm, db: Vm
) -> None:
    """A new run of web's: its secret is looked for all over dom0, and presented on db's own channel by somebody who got hold of it."""
    host, audit = bed[HOST], Audit(bed[HOST])
    web.guest.hang_up()
    web.orchestrator.stop(web.uuid)
    web.orchestrator.start(web.uuid, web.token)
    path = f"{home(web.guest.domain_id)}/{JOIN_PATH}"
    stolen = host.run(f"xenstore-read -R {path}").stdout
    join = json.loads(stolen)
    assert join["uuid"] == web.uuid
    assert len(join["join_secret"]) >= 43

    host.write("/run/secret-to-look-for", join["join_secret"])
    look = "grep -rlaF -f /run/secret-to-look-for"
    assert host.run(f"virsh -c xen:///system dumpxml web | {look} -", check=False).code == 1
    processes = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null"
    assert host.run(f"{processes} | {look} -", check=False).code == 1
    found = host.run(f"{look} /etc /var /root /opt/secfunet/releases/*/complete /tmp", check=False).text.split()
    assert [name for name in found if not name.startswith("/var/lib/xenstored/")] == []

    answer = attack(db.guest, ENROL_WITH, f"unix:{AGENT_STATE}/c/enrol", data=stolen)
    assert "refused the join secret" in answer["refused"]
    assert audit.records("enrol", decision="refused", vm=db.uuid)

    web.guest.wait_until_ready()
    web.orchestrator.wait_until_enrolled(web.uuid)
    assert host.run(f"xenstore-read {path}", check=False).code != 0
    assert web.guest.run(f"xenstore-read {JOIN_PATH}", check=False).code != 0
    web.must_work()
    db.must_work()
