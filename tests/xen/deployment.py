"""The checkout, deployed by its own playbooks onto fresh hosts, and saved as a state of the testbed for all tests to resume."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release.archive import build as build_archive
from release.deb import build as build_deb
from release.wheels import collect, locked_entries
from testbed import Host, Testbed
from testbed.agent_disk import agent_disk
from testbed.bed import pristine_digest
from testbed.build import build
from testbed.guests import domain_template

ROOT = Path(__file__).parents[2]
COLLECTION = ROOT / "ansible"
PLAYBOOK_TIMEOUT = 3000.0  # seconds; some hundred and fifty on a quiet machine
GRID, HOST, SECOND_HOST = "grid1", "xen1", "xen2"
VMS = ("web", "db", "app")
HOSTS = (HOST, GRID)


@dataclass(frozen=True)
class Release:
    """What is deployed: the archive of hosts, the agent's package, and a guest's disk with that installed."""

    archive: Path
    package: Path
    guest_disk: Path


def make_release(folder: Path) -> Release:
    """Builds it, or takes what was built from the same commit and tree."""
    collect(folder / "wheels")
    archive = build_archive(folder, folder / "wheels")
    package = folder / "kept" / _tree_digest() / "agent.deb"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        build_deb(folder, ROOT / ".build" / "deb" / "wheels").rename(package)
        # Another run may still use an earlier one.
        for old in sorted(package.parents[1].iterdir(), key=lambda path: path.stat().st_mtime)[:-3]:
            shutil.rmtree(old)
    return Release(archive, package, agent_disk(build(), package))


def inventory(xen_hosts: Mapping[str, Mapping[str, Any]], **grid: Any) -> dict[str, Any]:
    """One grid with a card for each VM, and these Xen hosts with their variables."""
    cards = [{"name": "op-1", "role": "server"}, *({"name": name, "role": "vm"} for name in VMS)]
    return {
        "grid": {"hosts": {GRID: {"gose_names": ["192.168.78.10"], "gose_secure_elements": cards, **grid}}},
        "xen_hosts": {"hosts": {name: dict(variables) for name, variables in xen_hosts.items()}},
    }


def host_variables(release: Release, folder: Path, **more: Any) -> dict[str, Any]:
    """Of a Xen host in these tests: what its VMs may do, and what its domains look like."""
    template = folder / "domain.xml"
    template.write_text(domain_template(kind="pvh"))
    rule = {"names": list(VMS), "operations": ["sign", "decrypt", "encrypt"]}
    return {
        "dom0_middleware_policy": [{**rule, "schemes": ["rsassa-pss-*", "rsaes-oaep-sha256"]}],
        "dom0_middleware_template": str(template),
        "common_release": str(release.archive),
        **more,
    }


def play(
    bed: Testbed,
    playbook: str,
    hosts: Mapping[str, Any],
    folder: Path,
    *options: str,
    timeout: float = PLAYBOOK_TIMEOUT,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs a playbook against the bed. With ``check``, AssertionError with the end of what it said if it fails."""
    listed = folder / "inventory.json"
    listed.write_text(json.dumps(hosts, indent=1))
    config = next(iter(bed.hosts.values())).ssh_config
    command = [
        *(str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(listed)),
        *("--ssh-common-args", f"-F {config}", f"playbooks/{playbook}.yml", *options),
    ]
    # Ansible keeps connections open and tells them apart by the host's name alone, which is the same in every bed.
    environment = {
        **os.environ,
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / f"c-{bed.name}"),
    }
    done = subprocess.run(
        command, cwd=COLLECTION, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or done.returncode == 0, f"{playbook}: {done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done


def deployed_state(release: Release, folder: Path) -> str:
    """The name of the state in which ``xen1`` and ``grid1`` are deployed; made if it is not there."""
    state = f"deployed-{_content()}"
    if Testbed.has_state(state, HOSTS):
        return state
    for old in (build() / "states").glob("deployed-*"):
        shutil.rmtree(old)
    with Testbed.resume(f"d-{_content()}", hosts=HOSTS) as bed:
        hosts = inventory({HOST: host_variables(release, folder)}, common_release=str(release.archive))
        before = {name: listing(bed[name]) for name in HOSTS}
        check = play(bed, "site", hosts, folder, "--check", "--diff")
        first = play(bed, "site", hosts, folder, "-vvv")
        after = {name: listing(bed[name]) for name in HOSTS}
        evidence = {"before": before, "after": after, "check": check.stdout, "first": first.stdout + first.stderr}
        bed.save(state)
    evidence_of(state).write_text(json.dumps(evidence))
    return state


def migration_state(release: Release, folder: Path) -> str:
    """The name of the state in which two Xen hosts, each a destination of the other, and a grid are deployed; made if it is not there."""
    state = f"pair-{_content()}"
    names = (HOST, SECOND_HOST, GRID)
    if Testbed.has_state(state, names):
        return state
    for old in (build() / "states").glob("pair-*"):
        shutil.rmtree(old)
    with Testbed.resume(f"p-{_content()}", hosts=names) as bed:
        for name in (HOST, SECOND_HOST):
            bed[name].accept_migrations()
        play(bed, "site", pair_inventory(bed, release, folder), folder)
        bed.save(state)
    return state


def pair_inventory(bed: Testbed, release: Release, folder: Path, **more: Any) -> dict[str, Any]:
    """Two Xen hosts, each a destination of the other, with ``more`` of their variables, and a grid."""
    hosts = {
        name: host_variables(
            release, folder, dom0_middleware_destinations={other: f"xen+tcp://{bed[other].address}/system"}, **more
        )
        for name, other in ((HOST, SECOND_HOST), (SECOND_HOST, HOST))
    }
    return inventory(hosts, common_release=str(release.archive))


def evidence_of(state: str) -> Path:
    """What was seen when the state was made: the hosts' files before and after, and what the playbook said, with --check and without."""
    return build() / "states" / state / "evidence.json"


def listing(host: Host) -> dict[str, str]:
    """Owner, group and mode of every file and folder of a host's disk."""
    found = host.run("find / -xdev -printf '%p\\t%u %g %m\\n'", check=False).stdout.decode(errors="replace")
    return dict(line.split("\t", 1) for line in found.splitlines() if "\t" in line)


def changed(output: str) -> set[tuple[str, str]]:
    """Host and task of each change that a playbook tells of."""
    task, found = "", set()
    for line in output.splitlines():
        if match := re.match(r"TASK \[(.*)\] \**$", line):
            task = match[1]
        elif match := re.match(r"changed: \[([^\] ]+)", line):
            found.add((match[1], task))
    return found


def _content() -> str:
    """Of what is deployed, and how. Not of the archive's bytes: the README is in them, too."""
    digest = hashlib.sha256(pristine_digest().encode())
    for entry in locked_entries().values():
        digest.update(entry.encode())
    rooms = ("secfunet", "secure_element", "gose", "gose_client", "dom0_middleware", "release", "protos", "ansible")
    for path in (Path(__file__), *(file for room in rooms for file in _files(ROOT / room))):
        digest.update(str(path.relative_to(ROOT)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _tree_digest() -> str:
    """Of what the agent's package is made of."""
    digest = hashlib.sha256()
    for name in ("secfunet", "vm_agent", "release", "packaging", "protos"):
        for path in _files(ROOT / name):
            digest.update(str(path.relative_to(ROOT)).encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update((ROOT / "requirements.lock").read_bytes())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Sequence[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".pyi", ".retry")
    ]
