"""A guest that does its worst over a real vchan, beside one that signs."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable

import pytest

from testbed import Host, Testbed
from tests.xen.attacks import FLOOD_VCHAN, PYTHON
from tests.xen.audit import Audit
from tests.xen.deployment import HOST
from tests.xen.vm import PSS, Vm

SECONDS = 20
WAYS = ("openreset", "pong", "bytes", "storm")
"""Each channel that one of them breaks costs 10 seconds until the next, then 20, then 40."""
MOST_GRANTS = 90
SHARE = 0.5  # 0.7 on a quiet machine, of signatures beside a guest that burns the same processor time


@pytest.fixture(scope="module")
def web(make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("web", 21)
    vm.boot()
    return vm


@pytest.fixture(scope="module")
def db(web: Vm, make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("db", 22)
    vm.boot()
    vm.guest.run("systemctl stop secfunet-vm-agent.service; cat >/run/flood.py", data=FLOOD_VCHAN.encode())
    return vm


class Daemon:
    """dom0's, as systemd and the kernel see it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def _show(self, what: str) -> int:
        return int(self._host.run(f"systemctl show -p {what} --value secure-middleware.service").text)

    @property
    def restarts(self) -> int:
        return self._show("NRestarts")

    @property
    def descriptors(self) -> int:
        return int(self._host.run(f"ls /proc/{self._show('MainPID')}/fd | wc -l").text)

    @property
    def resident(self) -> int:
        """MiB."""
        status = self._host.run(f"grep VmRSS /proc/{self._show('MainPID')}/status").text
        return int(status.split()[1]) // 1024


def signatures(vm: Vm, seconds: float) -> int:
    """One after the other; each has to succeed."""
    done, end = 0, time.monotonic() + seconds
    with vm.agent(timeout=60) as agent:
        while time.monotonic() < end:
            agent.sign(PSS, hashlib.sha256(str(done).encode()).digest())
            done += 1
    return done


def grants(host: Host, domain_id: int) -> int:
    """Active grants of dom0 to a domain, from Xen's own table."""
    host.run("xl dmesg -c >/dev/null; xl debug-keys g")
    table = host.run("xl dmesg").text.partition("grant-table for remote d0")[2].partition("grant-table for remote d")[0]
    return len(re.findall(rf"\[0x[0-9a-f]+\]\s+{domain_id}\s", table))


def test_floods_of_a_guest_cost_its_neighbour_little_and_end(bed: Testbed, web: Vm, db: Vm) -> None:
    host = bed[HOST]
    daemon, audit = Daemon(host), Audit(host)
    web.must_work()
    before = daemon.restarts, daemon.descriptors, daemon.resident
    db.guest.run(f"timeout {3 * SECONDS} sh -c 'while :; do :; done' >/dev/null 2>&1 &")
    beside_loop = signatures(web, 2 * SECONDS)
    time.sleep(SECONDS)
    db.guest.run(f"nohup {PYTHON} /run/flood.py {SECONDS} {' '.join(WAYS)} keep >/run/flood.json 2>&1 &")
    beside_flood = signatures(web, 2 * SECONDS)
    during = daemon.descriptors, daemon.resident
    assert beside_flood >= SHARE * beside_loop
    db.guest.wait_for("test -s /run/flood.json", timeout=900, pause=5)
    told = json.loads(db.guest.run("cat /run/flood.json").stdout)
    assert told["openreset"]["ended"]
    assert told["pong"]["ended"]
    assert daemon.restarts == before[0]
    assert max(during[0], daemon.descriptors) < 100
    assert max(during[1], daemon.resident) <= before[2] + 20
    ended = audit.records("channel.ended", vm=db.uuid, reason="CHANNEL_FLOODED")
    assert len(ended) == sum(bool(told[way]["ended"]) for way in WAYS)  # once each
    web.must_work()


def test_a_guest_that_keeps_every_channels_pages_gets_no_more(bed: Testbed, web: Vm, db: Vm) -> None:
    """After the test above: the channels of its run are used up, and all of them are mapped."""
    assert 0 < grants(bed[HOST], db.guest.domain_id) < MOST_GRANTS
    said = bed[HOST].run(f"journalctl -u secure-middleware.service | grep {db.uuid} | grep -c 'gets no more'").text
    assert int(said) == 1
    assert "channels of its run" in db.orchestrator.get(db.uuid).channel_refused
    assert not db.orchestrator.get(web.uuid).channel_refused
    web.must_work()


def test_a_hostile_guest_is_stopped_at_once_and_its_next_run_is_whole(web: Vm, db: Vm) -> None:
    begin = time.monotonic()
    db.guest.hang_up()
    db.orchestrator.stop(db.uuid)
    assert time.monotonic() - begin < 60  # an emulated host; nothing waits for the guest
    db.boot()
    db.must_work()
    web.must_work()
