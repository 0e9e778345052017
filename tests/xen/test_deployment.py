"""What the playbooks promise: a bare host becomes a working one, a second run changes nothing, no secret gets out, and day two works."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from release.archive import build as build_archive
from secfunet.identity import der_of, load_certificate, thumbprint
from testbed import Testbed
from testbed.guests import Guest
from tests.xen.deployment import (
    GRID,
    HOST,
    HOSTS,
    VMS,
    Release,
    changed,
    evidence_of,
    host_variables,
    inventory,
    play,
)
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import CERTIFICATES, CONFIG, GOSE, Vm, certificate, issue_token

OWN = re.compile(
    r"/(opt/secfunet|etc/secfunet|var/lib/secfunet-[a-z]+)(/.*)?"
    r"|/etc/systemd/system/(secure-element@|gose|secure-middleware)\.service"
    r"|/etc/systemd/system/multi-user\.target\.wants/(secure-element@.*|gose|secure-middleware)\.service"
    r"|/etc/sysusers\.d(/secfunet-(gose|middleware)\.conf)?"
    r"|/etc/modprobe\.d/secfunet\.conf|/usr/local/bin/(gose|secure-element|secure-middleware)"
    r"|/etc/(passwd|group|shadow|gshadow)-|/etc/\.pwd\.lock"  # shadow's own, when a user is made
    r"|/root/\.ansible(/.*)?|/var/(log|tmp|lib/systemd|lib/private)(/.*)?|/tmp(/.*)?|/var/lib/libvirt(/.*)?|/var/cache(/.*)?"
)
SECURE_MIDDLEWARE = "/opt/secfunet/current/bin/secure-middleware"


@pytest.fixture(scope="module")
def evidence(deployed: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(evidence_of(deployed).read_text())
    return found


@pytest.fixture(scope="module")
def hosts(release: Release, work: Path) -> dict[str, Any]:
    return inventory({HOST: host_variables(release, work)}, common_release=str(release.archive))


@pytest.fixture(scope="module")
def secrets_there(bed: Testbed) -> list[str]:
    """PINs, keys of stores, and the administrator's keys, that the playbook had made on the hosts."""
    found: list[str] = []
    for name in HOSTS:
        found += (
            bed[name].run("cat /etc/secfunet/cards/*/secret/*.pin /etc/secfunet/cards/*/secret/store.key").text.split()
        )
        found += re.findall(r"[0-9a-fA-F]{32,}", bed[name].run("cat /etc/secfunet/cards/*/secret/card.keys").text)
    assert len(found) == (len(VMS) + 1 + 1) * (4 + 1)  # a server card, and the hypervisor's
    return found


def works(bed: Testbed) -> None:
    """Every card is in service, and both daemons answer."""
    grid = "runuser -u secfunet-gose -- /opt/secfunet/current/bin/gose status --config /etc/secfunet/gose/gose.toml"
    said = bed[GRID].wait_for(f"{grid} | tee /dev/stderr | grep -q 'in service' && ! {grid} | grep -q 'not in service'")
    assert said.code == 0
    bed[HOST].wait_for(f"{SECURE_MIDDLEWARE} vm list --timeout 60")
    for name in HOSTS:
        assert bed[name].run("systemctl list-units --failed --plain --no-legend").text == ""


def hypervisor(bed: Testbed) -> str:
    """The thumbprint of its certificate (x5t#S256), as dom0 has it."""
    return thumbprint(der_of(load_certificate(bed[HOST].get("/etc/secfunet/middleware/hypervisor.pem"))))


def hypervisor_in(token: str) -> str:
    """The thumbprint that a VM-Auth-Token is for."""
    payload = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return str(claims["cnf"]["x5t#S256"])


def test_check_mode_on_a_bare_host_tells_what_will_change(evidence: dict[str, Any]) -> None:
    assert changed(evidence["check"]) == changed(evidence["first"])
    assert len(changed(evidence["first"])) >= 10


def test_check_mode_left_a_bare_host_bare(evidence: dict[str, Any]) -> None:
    """Each user, folder and release was made by the run after it."""
    assert (HOST, "common : Make the users") in changed(evidence["first"])
    assert (GRID, "common : Unpack the release") in changed(evidence["first"])


def test_owners_and_modes_outside_its_own_folders_are_as_before(evidence: dict[str, Any]) -> None:
    for name in HOSTS:
        before, after = evidence["before"][name], evidence["after"][name]
        assert len(before) > 1000
        differing = {path: (before.get(path), after.get(path)) for path in before.keys() | after.keys()}
        foreign = {path: two for path, two in differing.items() if two[0] != two[1] and not OWN.fullmatch(path)}
        assert foreign == {}, name


def test_the_hosts_work(bed: Testbed) -> None:
    works(bed)


def test_no_secret_is_in_what_was_said_or_logged(
    bed: Testbed, evidence: dict[str, Any], secrets_there: list[str]
) -> None:
    logs = {name: bed[name].run("journalctl -o cat --no-pager").text for name in HOSTS}
    for what, text in {**logs, "check": evidence["check"], "first": evidence["first"]}.items():
        assert len(text) > 1000, what
        assert [secret for secret in secrets_there if secret in text] == [], what
        assert "PRIVATE KEY" not in text, what


def test_no_secret_is_in_a_file_that_others_may_read(bed: Testbed, secrets_there: list[str]) -> None:
    for name in HOSTS:
        host = bed[name]
        host.write("/root/secrets", "\n".join(secrets_there) + "\n-----BEGIN PRIVATE KEY-----\n")
        # A file is as private as the folders above it: what others can reach is what nobody finds.
        look = "setpriv --reuid nobody --regid nogroup --clear-groups find /etc /opt/secfunet /var /root /tmp /run -xdev -type f -readable"
        found = host.run(f"{look} -print0 2>/dev/null | xargs -0 grep -lsFf /root/secrets --", check=False)
        host.run("rm /root/secrets")
        assert [path for path in found.text.splitlines() if not path.startswith("/opt/secfunet/releases/")] == [], name
        private = host.run(
            "find /etc/secfunet /var/lib/secfunet-* -path '*/secret/*' -o -name '*.key' | xargs stat -c '%a %n'"
        )
        assert {line.split()[0] for line in private.text.splitlines()} <= {"600", "400"}, private.text


def test_a_second_run_changes_nothing(bed: Testbed, hosts: dict[str, Any], work: Path) -> None:
    said = play(bed, "site", hosts, work).stdout
    assert changed(said) == set()
    assert re.findall(r"changed=(\d+)", said) == ["0", "0"]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ({"gose_secure_elements": [{"name": "web", "role": "vm"}]}, 'at least one card with the role "server"'),
        ({"gose_port_grpc": 8443}, "four different ports"),
        ({"gose_port_grpc": 80}, "ports from 1024 to 65535"),
        ({"dom0_middleware_grid": "gird1"}, "the inventory has no such host"),
        ({"dom0_middleware_channel": "tcp"}, "must be the IP address of dom0 on xenbr0"),
        ({"dom0_middleware_policy": [{"operations": ["sing"], "schemes": ["*"]}]}, "no match for: sing"),
        ({"common_release": "/nonexistent/secfunet-release-9.tar.gz"}, "'make release' makes it"),
    ],
    ids=[
        "no server card",
        "one port twice",
        "a port of the system",
        "unknown grid",
        "tcp without address",
        "policy",
        "no release",
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_done(
    bed: Testbed, hosts: dict[str, Any], work: Path, what: dict[str, Any], sentence: str
) -> None:
    done = play(bed, "site", hosts, work, "-e", json.dumps(what), check=False)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert sentence in said
    assert changed(done.stdout) == set()


def test_a_host_that_is_no_dom0_is_refused(bed: Testbed, hosts: dict[str, Any], work: Path) -> None:
    wrong = {**hosts, "xen_hosts": {"hosts": {GRID: hosts["xen_hosts"]["hosts"][HOST]}}}
    done = play(bed, "site", wrong, work, "--limit", "xen_hosts", check=False)
    assert done.returncode != 0
    assert f"{GRID} is no dom0 of a running Xen" in " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def newer(release: Release, work: Path) -> Path:
    return build_archive(work, release.archive.parent / "wheels", "+2")


def release_of(bed: Testbed, name: str) -> str:
    return bed[name].run("basename $(readlink /opt/secfunet/current)").text


def test_an_upgrade_and_the_way_back(bed: Testbed, hosts: dict[str, Any], work: Path, newer: Path) -> None:
    before = {name: release_of(bed, name) for name in HOSTS}
    play(bed, "upgrade", hosts, work, "-e", f"common_release={newer}")
    assert all("+2-" in release_of(bed, name) for name in HOSTS)
    works(bed)
    play(bed, "rollback", hosts, work)
    assert {name: release_of(bed, name) for name in HOSTS} == before
    works(bed)


def test_rotation_gives_new_certificates_and_ends_old_tokens(bed: Testbed, hosts: dict[str, Any], work: Path) -> None:
    doors = f"openssl x509 -noout -serial -in {CERTIFICATES}/../state/authority/service-provider.pem"
    old = hypervisor(bed), bed[GRID].run(doors).text
    token = issue_token(bed[GRID], "web", HOST)
    assert hypervisor_in(token) == old[0]
    play(bed, "rotate", hosts, work)
    assert hypervisor(bed) != old[0]
    assert bed[GRID].run(doors).text != old[1]
    works(bed)
    # The grid compares the two at each use; the old token names a hypervisor that is no more.
    assert hypervisor_in(issue_token(bed[GRID], "web", HOST)) == hypervisor(bed)


def test_a_lost_card_of_a_vm_is_replaced(bed: Testbed, hosts: dict[str, Any], work: Path) -> None:
    grid, lost = bed[GRID], certificate(bed[GRID], "db")
    grid.run("systemctl stop secure-element@db.service; rm -r /var/lib/secfunet-card/db")
    grid.run(f"{GOSE} revoke vm db {CONFIG}")
    play(bed, "site", hosts, work, "-e", json.dumps({"gose_replace": ["db"]}))
    works(bed)
    replaced = certificate(grid, "db")
    assert replaced.serial_number != lost.serial_number
    assert replaced.public_key() != lost.public_key()
    issue_token(grid, "db", HOST)


def test_a_lost_card_of_a_hypervisor_is_replaced(bed: Testbed, hosts: dict[str, Any], work: Path) -> None:
    host, lost = bed[HOST], hypervisor(bed)
    host.run("systemctl stop secure-middleware.service secure-element@*.service")
    host.run(
        f"rm -r /var/lib/secfunet-card/{HOST} /etc/secfunet/middleware/{HOST}.csr /etc/secfunet/middleware/enrolled"
    )
    bed[GRID].run(f"{GOSE} revoke hypervisor {HOST} {CONFIG}")
    play(bed, "site", hosts, work, "-e", "dom0_middleware_renew=true", "--limit", HOST)
    works(bed)
    assert hypervisor(bed) != lost
    issue_token(bed[GRID], "web", HOST)


def test_a_backup_is_sealed_and_fresh_hosts_are_restored_from_it(
    bed: Testbed,
    hosts: dict[str, Any],
    work: Path,
    release: Release,
    secrets_there: list[str],
    make_vm: Callable[..., Vm],
) -> None:
    """A VM that the lost hosts knew uses its key on the new ones."""
    web = make_vm("web", 21)
    passphrase = work / "passphrase"
    passphrase.write_text("a passphrase of this test alone\n")
    passphrase.chmod(0o644)
    options = ("-e", f"secfunet_backup={work}/backup", "-e", f"secfunet_passphrase={passphrase}", "-vvv")
    refused = play(bed, "backup", hosts, work, *options, check=False)
    assert "of mode 0600" in " ".join(refused.stdout.split())
    passphrase.chmod(0o600)
    said = play(bed, "backup", hosts, work, *options)
    copies = sorted((work / "backup").iterdir())
    assert [(path.name, path.stat().st_mode & 0o777) for path in copies] == [
        (f"{n}.vault", 0o600) for n in sorted(HOSTS)
    ]
    assert all(path.read_text().startswith("$ANSIBLE_VAULT;") for path in copies)
    assert [secret for secret in secrets_there if secret in said.stdout + said.stderr] == []
    works(bed)
    refused = play(bed, "restore", hosts, work, *options, check=False)
    assert "has secure elements already" in " ".join(refused.stdout.split())
    known = hypervisor(bed), certificate(bed[GRID], "web").serial_number

    with Testbed.resume("restored", hosts=HOSTS, guest_disk=release.guest_disk) as fresh:
        for name in (GRID, HOST):  # the second one alone, as after the loss of a hypervisor
            said = play(fresh, "restore", hosts, work, *options, "--limit", name)
            assert [secret for secret in secrets_there if secret in said.stdout + said.stderr] == []
        works(fresh)
        assert (hypervisor(fresh), certificate(fresh[GRID], "web").serial_number) == known
        folder = work / "restored"
        folder.mkdir()
        with Orchestrator(fresh[HOST], folder) as orchestrator:
            assert orchestrator.list()["web"].uuid == web.uuid
            guest, token = Guest(fresh[HOST], "web", web.guest.address), issue_token(fresh[GRID], "web", HOST)
            again = replace(web, guest=guest, orchestrator=orchestrator, folder=folder, token=token)
            again.boot()
            again.must_work()
            guest.hang_up()


def test_a_decommissioned_host_has_no_right_and_nothing_of_ours(
    bed: Testbed, hosts: dict[str, Any], work: Path, evidence: dict[str, Any]
) -> None:
    bed[HOST].run(f"{SECURE_MIDDLEWARE} vm delete web", check=False)
    refused = play(bed, "decommission", hosts, work, check=False)
    assert "Say which one" in refused.stdout
    play(bed, "decommission", hosts, work, "-e", f"secfunet_hypervisor={HOST}")
    for path in (
        "/etc/secfunet",
        "/opt/secfunet",
        "/var/lib/secfunet*",
        "/usr/local/bin/secure-*",
        "/etc/systemd/system/secure-*",
    ):
        assert bed[HOST].run(f"ls -d {path}", check=False).code != 0, path
    assert bed[HOST].run("getent passwd secfunet-card", check=False).code != 0
    assert bed[HOST].run("systemctl list-units --all --plain --no-legend 'secure-*'").text == ""
    with pytest.raises(Exception, match="hypervisor"):
        issue_token(bed[GRID], "web", HOST)


def test_a_decommissioned_host_joins_anew(bed: Testbed, hosts: dict[str, Any], work: Path) -> None:
    """Under its name, which was revoked: by nothing less than saying so."""
    refused = play(bed, "site", hosts, work, check=False)
    assert "is enrolled already" in refused.stdout
    play(bed, "site", hosts, work, "-e", "dom0_middleware_renew=true", "--limit", HOST)
    works(bed)
    issue_token(bed[GRID], "web", HOST)
