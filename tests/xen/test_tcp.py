"""Over TCP on the bridge: the same keys, and a neighbour that takes another's address, or says so."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secfunet.xen import JOIN_PATH, home
from testbed import Testbed
from tests.xen.attacks import CALL_WITH, KNOCK, PYTHON, SPOOF_BRIDGE, attack
from tests.xen.audit import Audit
from tests.xen.deployment import GRID, HOST, Release, host_variables, inventory, play
from tests.xen.vm import AGENT_STATE, PSS, Vm

DOM0 = "192.168.77.1"


@pytest.fixture(scope="module")
def over_tcp(bed: Testbed, release: Release, work: Path) -> Testbed:
    """The playbook gives the host another channel."""
    choice = {"dom0_middleware_channel": "tcp", "dom0_middleware_bridge_address": DOM0}
    hosts = inventory({HOST: host_variables(release, work, **choice)}, common_release=str(release.archive))
    play(bed, "site", hosts, work, "--limit", HOST)
    return bed


@pytest.fixture(scope="module")
def web(over_tcp: Testbed, make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("web", 21)
    vm.boot()
    return vm


@pytest.fixture(scope="module")
def db(web: Vm, make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("db", 22)
    vm.boot()
    return vm


def agent_port(vm: Vm) -> int:
    """Where its agent goes: the address that its enrolment keeps."""
    kept = json.loads(vm.guest.run(f"cat {AGENT_STATE}/enrolment.json").stdout)
    scheme, address, port = str(kept["agent"]).split(":")
    assert (scheme, address) == ("tcp", DOM0)
    return int(port)


def test_two_guests_sign_and_decrypt(web: Vm, db: Vm) -> None:
    for vm in (web, db):
        vm.must_work()
        assert vm.status()["transport"] == "tcp"
    assert agent_port(web) != agent_port(db)


def test_a_neighbour_at_the_others_port_is_refused_and_recorded(bed: Testbed, web: Vm, db: Vm) -> None:
    """db, from its own address, with web's certificate and key."""
    audit = Audit(bed[HOST])
    stolen = web.guest.run(f"cat {AGENT_STATE}/enrolment.json").stdout
    answer = attack(db.guest, CALL_WITH, f"ipv4:{DOM0}:{agent_port(web)}", "20", data=stolen)
    assert answer["code"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert audit.records("channel.refused", vm=web.uuid, reason="CHANNEL_FOREIGN")
    web.must_work()


def test_a_neighbour_with_the_others_address_gets_nowhere(bed: Testbed, web: Vm, db: Vm) -> None:
    """db takes web's IP address, then its MAC address too, with web's certificate and key: dom0 answers at web's interface alone."""
    host, port = bed[HOST], agent_port(web)
    stolen = web.guest.run(f"cat {AGENT_STATE}/enrolment.json").stdout
    mac = web.guest.run("cat /sys/class/net/e*/address").text
    interface = db.guest.run("basename /sys/class/net/e*").text
    own = db.guest.run(f"cat /sys/class/net/{interface}/address").text
    # db is driven from its console while it has lost its address: a script that runs by itself.
    for take_mac in (False, True):
        audit = Audit(host)
        db.guest.run("cat >/run/stolen.json", data=stolen)
        db.guest.run("cat >/run/attack.py", data=CALL_WITH.encode())
        change = (
            f"ip link set {interface} down; ip link set {interface} address {mac}; ip link set {interface} up;"
            if take_mac
            else ""
        )
        back = (
            f"ip link set {interface} down; ip link set {interface} address {own}; ip link set {interface} up;"
            if take_mac
            else ""
        )
        script = f"""
        exec >/run/attack.log 2>&1
        sleep 1
        ip addr flush dev {interface}
        {change}
        ip addr add {web.guest.address}/24 dev {interface}
        for attempt in 1 2 3; do
            arping -U -c 1 -I {interface} {web.guest.address} 2>/dev/null || true
            /usr/lib/secfunet/vm-agent/bin/python3 /run/attack.py ipv4:{DOM0}:{port} 15 </run/stolen.json >>/run/answers
        done
        ip addr flush dev {interface}
        {back}
        ip addr add {db.guest.address}/24 dev {interface}
        touch /run/attack-done
        """
        db.guest.run("rm -f /run/answers /run/attack-done; cat >/run/attack.sh", data=script.encode())
        db.guest.run("nohup sh /run/attack.sh >/dev/null 2>&1 &")
        db.guest.hang_up()
        web.must_work()
        db.guest.wait_for("test -e /run/attack-done", timeout=600, pause=3)
        answers = [json.loads(line) for line in db.guest.run("cat /run/answers").text.splitlines()]
        assert len(answers) == 3
        assert all("container" not in answer for answer in answers), answers
        assert not audit.records(vm=web.uuid, reason="CHANNEL_FOREIGN"), answers
    web.must_work()
    db.must_work()


def test_what_a_neighbour_says_of_addresses_cuts_nobody_off(bed: Testbed, web: Vm, db: Vm) -> None:
    """A minute of ARP that puts web's address and dom0's at db's interface, of frames with web's MAC address, and 50,000 with others."""
    audit = Audit(bed[HOST])
    mac = web.guest.run("cat /sys/class/net/e*/address").text
    interface = db.guest.run("basename /sys/class/net/e*").text
    what = f"arp={web.guest.address} mac={mac} arp={DOM0} macs=50000"
    db.guest.run("cat >/run/spoof.py", data=SPOOF_BRIDGE.encode())
    db.guest.run(f"nohup {PYTHON} /run/spoof.py {interface} 60 5 {what} >/run/spoof.json 2>&1 &")
    signed, end = 0, time.monotonic() + 60
    with web.agent(timeout=60) as agent:
        while time.monotonic() < end:
            agent.sign(PSS, hashlib.sha256(b"beside a neighbour").digest())
            signed += 1
    assert signed >= 5
    assert not audit.records(vm=web.uuid, decision="refused")
    db.guest.wait_for("test -s /run/spoof.json", timeout=300, pause=3)
    assert json.loads(db.guest.run("cat /run/spoof.json").stdout)["sent"] > 0


def test_connections_of_a_neighbour_cost_the_other_nothing(bed: Testbed, web: Vm, db: Vm) -> None:
    audit = Audit(bed[HOST])
    db.guest.run("cat >/run/knock.py", data=KNOCK.encode())
    db.guest.run(f"nohup {PYTHON} /run/knock.py {DOM0} {agent_port(web)} 60 200 >/run/knock.json 2>&1 &")
    with web.agent(timeout=60) as agent:
        for _ in range(5):
            agent.sign(PSS, hashlib.sha256(b"beside a neighbour").digest())
    db.guest.wait_for("test -s /run/knock.json", timeout=300, pause=3)
    assert len(audit.records("channel.refused", vm=web.uuid)) <= 90  # one a second, at most
    web.must_work()


def test_a_neighbour_cannot_read_the_others_join_secret(web: Vm, db: Vm) -> None:
    path = f"{home(web.guest.domain_id)}/{JOIN_PATH}"
    assert db.guest.run(f"xenstore-read {path}", check=False).code != 0
    web.must_work()


def test_the_middleware_restarts_and_the_ports_are_the_same(bed: Testbed, web: Vm) -> None:
    before = agent_port(web)
    bed[HOST].run("systemctl restart secure-middleware.service")
    web.must_work()
    assert agent_port(web) == before


def test_the_grid_restarts(bed: Testbed, web: Vm) -> None:
    bed[GRID].run("systemctl kill --signal=KILL gose.service")
    web.must_work()
