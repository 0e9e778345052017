"""The agent's package in a real guest: how it starts, what it may, and what stays of it after an upgrade, a removal and a purge."""

from __future__ import annotations

import re
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.hashes import SHA256

from testbed import Testbed
from testbed.guests import domain_template
from tests.xen.deployment import HOST, Release
from tests.xen.vm import Vm, openssl_verifies

UNIT = "secfunet-vm-agent.service"
TEMPLATE = "/etc/secfunet/middleware/domain.xml"
ENROLMENT = "/run/secfunet/state/enrolment.json"
CONFFILE = "/etc/secfunet/vm-agent.toml"
DEVICES = "/dev/xen/xenbus /dev/xen/evtchn /dev/xen/gntdev"
MAX_IDLE_MEMORY = 60 * 1024  # KiB
OAEP = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)
# No package and no byte comes from elsewhere: the shell has no network at all.
OFFLINE = "DEBIAN_FRONTEND=noninteractive unshare --net dpkg"


def shown(vm: Vm, unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit in the guest."""
    said = vm.guest.run(f"systemctl show {unit} {' '.join(f'-p {name}' for name in names)}").text
    return dict(line.split("=", 1) for line in said.splitlines())


def modes(vm: Vm) -> set[str]:
    return set(vm.guest.run(f"stat -c '%U:%G %a' {DEVICES}").text.splitlines())


@pytest.fixture(scope="module")
def web(make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("web", 21, memory_mib=512)  # an upgrade is written beside what it replaces, here in memory
    vm.boot()
    return vm


@pytest.fixture(scope="module")
def newer(release: Release, work: Path) -> Path:
    """The same package with a later version, packed quickly."""
    tree, target = work / "newer", work / "newer.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", release.package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*", r"\g<0>+upgrade1", control.read_text(encoding="utf-8")))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", tree, target], check=True)
    return target


def test_it_starts_before_the_network(web: Vm) -> None:
    started = {
        unit: int(shown(web, unit, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])
        for unit in (UNIT, "network-pre.target", "network.target", "ssh.service")
    }
    assert 0 < started[UNIT] <= started["network-pre.target"] <= started["network.target"] <= started["ssh.service"]


def test_it_may_do_little(web: Vm) -> None:
    facts = shown(web, UNIT, "Type", "User", "ConditionResult", "NRestarts", "WatchdogUSec", "MainPID")
    assert (facts["Type"], facts["User"], facts["ConditionResult"]) == ("notify", "secfunet-agent", "yes")
    assert (facts["NRestarts"], facts["WatchdogUSec"]) == ("0", "1min")
    status = web.guest.run(f"cat /proc/{facts['MainPID']}/status").text
    assert re.search(r"(?m)^CapEff:\s+0+$", status)
    assert re.search(r"(?m)^NoNewPrivs:\s+1$", status)
    assert re.search(r"(?m)^Seccomp:\s+2$", status)
    assert web.guest.run(f"stat -c %U /proc/{facts['MainPID']}").text == "secfunet-agent"
    web.guest.run(f"systemd-analyze security --threshold=20 --no-pager {UNIT}")
    assert modes(web) == {"root:secfunet-agent 660"}
    assert web.guest.run("stat -c '%U:%G %a' /dev/xen/privcmd").text == "root:root 600"


def test_where_there_is_no_xen_it_does_not_start(bed: Testbed) -> None:
    """dom0 is no virtual machine: the unit's condition does not hold there."""
    condition = "systemd-analyze condition 'ConditionVirtualization=xen'"
    assert bed[HOST].run(condition, check=False).code != 0


def test_idle_it_needs_less_than_60_mib(web: Vm) -> None:
    web.must_work()
    facts = shown(web, UNIT, "MainPID", "ControlGroup")
    rollup = web.guest.run(f"cat /proc/{facts['MainPID']}/smaps_rollup").text
    resident = int(re.findall(r"(?m)^Rss:\s+(\d+) kB", rollup)[0])
    assert resident < MAX_IDLE_MEMORY, rollup
    # What the kernel holds for it; not files that it read once (MemoryCurrent counts them, any other program can have their room).
    stat = web.guest.run(f"cat /sys/fs/cgroup{facts['ControlGroup']}/memory.stat").text
    held = {name: int(value) for name, value in (line.split() for line in stat.splitlines())}
    assert held["anon"] + held["kernel"] + held["file_mapped"] < MAX_IDLE_MEMORY * 1024, stat


def test_its_commands_sign_and_decrypt(web: Vm) -> None:
    document, secret = secrets.token_bytes(5000), secrets.token_bytes(32)
    signature = web.guest.run("vm-agent sign - --timeout 200", data=document).stdout
    openssl_verifies(web.certificate, document, signature, web.folder)
    encrypted = web.public_key.encrypt(secret, OAEP)
    assert web.guest.run("vm-agent decrypt - --timeout 200", data=encrypted).stdout == secret


def test_memory_that_was_used_before_changes_nothing(web: Vm) -> None:
    """glibc fills what malloc gives with ones: libxenvchan leaves flags as they were, and would wait in the agent's only thread."""
    drop_in = f"/run/systemd/system/{UNIT}.d/perturb.conf"
    before = shown(web, UNIT, "NRestarts")
    web.guest.run(
        f"mkdir -p {drop_in.rpartition('/')[0]}; printf '[Service]\nEnvironment=MALLOC_PERTURB_=128\n' >{drop_in}"
    )
    web.guest.run(f"systemctl daemon-reload; systemctl restart {UNIT}")
    web.must_work()
    web.guest.run("sleep 70")  # longer than the watchdog waits
    web.must_work()
    assert shown(web, UNIT, "NRestarts") == before
    web.guest.run(f"rm {drop_in}; systemctl daemon-reload; systemctl restart {UNIT}")


def test_hung_it_is_restarted_and_still_enrolled(web: Vm) -> None:
    before, kept = shown(web, UNIT, "MainPID"), web.guest.run(f"sha256sum {ENROLMENT}").text
    web.guest.run(f"kill -STOP {before['MainPID']}")
    deadline = time.monotonic() + 1200
    while shown(web, UNIT, "NRestarts", "SubState") != {"NRestarts": "1", "SubState": "running"}:
        assert time.monotonic() < deadline
        time.sleep(2)
    assert "Watchdog timeout" in web.guest.run(f"journalctl -u {UNIT} --no-pager").text
    assert shown(web, UNIT, "MainPID") != before
    assert web.guest.run(f"sha256sum {ENROLMENT}").text == kept
    web.must_work()


def test_an_upgrade_keeps_enrolment_settings_and_what_was_disabled(web: Vm, newer: Path) -> None:
    web.guest.run(f"echo 'log_level = \"debug\"' >>{CONFFILE} && systemctl disable {UNIT}")
    before, kept = shown(web, UNIT, "MainPID"), web.guest.run(f"sha256sum {ENROLMENT} {CONFFILE}").text
    web.guest.put(newer, "/run/newer.deb")
    web.guest.run(f"{OFFLINE} --install /run/newer.deb && rm /run/newer.deb", timeout=1800)
    assert web.guest.run("dpkg-query -W -f '${Version}' secfunet-vm-agent").text.endswith("+upgrade1")
    assert shown(web, UNIT, "MainPID") != before
    assert web.guest.run(f"sha256sum {ENROLMENT} {CONFFILE}").text == kept
    assert web.guest.run(f"systemctl is-enabled {UNIT}", check=False).text == "disabled"
    web.must_work()


def test_removed_it_leaves_its_settings_and_purged_nothing(web: Vm) -> None:
    web.guest.run(f"{OFFLINE} --remove secfunet-vm-agent", timeout=1800)
    assert not web.guest.run("pgrep -u secfunet-agent", check=False).text
    assert modes(web) == {"root:root 600"}
    assert (
        web.guest.run(f"test -e {CONFFILE} && test ! -e /run/secfunet && test ! -e /usr/lib/secfunet; echo $?").text
        == "0"
    )
    web.guest.run(f"{OFFLINE} --purge secfunet-vm-agent", timeout=1800)
    left = "find / -xdev \\( -path /proc -o -path /var/log \\) -prune -o \\( -name '*secfunet*' -o -name 'vm-agent*' \\) -print"
    assert web.guest.run(left).text == ""
    # As is usual in Debian: the user stays, so that its number is nobody else's.
    assert web.guest.run("id -un secfunet-agent").text == "secfunet-agent"


def test_a_guest_without_an_interface_signs(bed: Testbed, make_vm: Callable[..., Vm]) -> None:
    script = "ls /sys/class/net; echo letter >/run/letter; vm-agent sign /run/letter --timeout 200 | base64 -w0; echo; vm-agent status"
    bed[HOST].write(TEMPLATE, domain_template(interface=False, script=script))
    bed[HOST].run("systemctl restart secure-middleware.service")
    db = make_vm("db", 22)
    db.boot()
    said = [line.partition("TESTBED ")[2].strip() for line in db.guest.console().splitlines() if "TESTBED " in line]
    assert said[0] == "lo"
    signature = subprocess.run(["base64", "-d"], input=said[1].encode(), capture_output=True, check=True).stdout
    openssl_verifies(db.certificate, b"letter\n", signature, db.folder)
    assert any(re.fullmatch(r"transport\s+vchan", line) for line in said)
