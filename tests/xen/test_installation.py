"""The agent comes to guests that have none: with a cloud-init seed that dom0 made, without a network; and with the Ansible role."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import Testbed
from testbed.agent_disk import cloud_init_disk
from testbed.build import build
from testbed.guests import domain_template
from tests.xen.deployment import GRID, HOST, HOSTS, Release, changed, play
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import Vm

SECURE_MIDDLEWARE = "/opt/secfunet/current/bin/secure-middleware"
TEMPLATE = "/etc/secfunet/middleware/domain.xml"
SEEDS = "/var/lib/xen/images"
WRITER = ("genisoimage", "libmagic1", "libmagic-mgc")  # Debian's packages with what writes a seed


@pytest.fixture(scope="module")
def bed(deployed: str) -> Iterator[Testbed]:
    """Guests have cloud-init, and no agent."""
    with Testbed.resume("installation", hosts=HOSTS, state=deployed, guest_disk=cloud_init_disk(build())) as made:
        yield made


@pytest.fixture(scope="module")
def writer(bed: Testbed, work: Path) -> None:
    """dom0 can write seeds: its packages come from here, it has no network."""
    folder = work / "writer"
    folder.mkdir()
    subprocess.run(["apt-get", "-qq", "download", *WRITER], cwd=folder, check=True)
    bed[HOST].put(folder, "/run/writer")
    bed[HOST].run("dpkg --install /run/writer/*.deb", timeout=1200)


def test_a_seed_installs_and_enrols_the_agent(
    bed: Testbed, writer: None, release: Release, orchestrator: Orchestrator, work: Path
) -> None:
    host = bed[HOST]
    seed = f"<disk type='file' device='disk'><driver name='phy'/><source file='{SEEDS}/${{name}}-seed.iso'/>"
    seed += "<target dev='xvdb' bus='xen'/><readonly/></disk>"
    host.write(TEMPLATE, domain_template().replace("<console", f"{seed}<console", 1))
    host.run("systemctl restart secure-middleware.service")
    host.put(release.package, "/run/secfunet-vm-agent.deb")
    host.write("/run/network", "network: {config: disabled}\n")
    # What is written stays in memory: the packages, and what they become.
    web = Vm.make("web", 21, grid=bed[GRID], host=host, orchestrator=orchestrator, folder=work, memory_mib=512)
    host.run(
        f"{SECURE_MIDDLEWARE} vm user-data web --package /run/secfunet-vm-agent.deb --network-config /run/network"
        f" --seed {SEEDS}/web-seed.iso"
    )
    web.boot()
    done = web.guest.run("cloud-init status --wait --long", timeout=1800, check=False)
    assert "status: done" in done.text, web.guest.run("tail -n 60 /var/log/cloud-init-output.log").text
    assert web.guest.run("cloud-init query instance_id").text == web.uuid
    web.must_work()


def test_the_role_installs_the_agent_once(
    bed: Testbed, release: Release, orchestrator: Orchestrator, work: Path
) -> None:
    host = bed[HOST]
    host.write(TEMPLATE, domain_template())
    host.run("systemctl restart secure-middleware.service")
    db = Vm.make("db", 22, grid=bed[GRID], host=host, orchestrator=orchestrator, folder=work, memory_mib=512)
    orchestrator.start(db.uuid, db.token)
    db.guest.wait_until_ready()
    db.guest.run("useradd --create-home someone")
    reached = {"ansible_host": db.guest.address, "ansible_ssh_extra_args": f"-J {HOST}"}
    wishes = {"vm_agent_package": str(release.package), "vm_agent_users": ["someone"]}
    inventory = {
        "grid": {"hosts": {}},
        "xen_hosts": {"hosts": {}},
        "guests": {"hosts": {"db": {**reached, **wishes}}},
    }
    play(bed, "site", inventory, work, "--check", "--diff")
    assert db.guest.run("getent group secfunet-vm", check=False).code != 0
    assert ("db", "vm_agent : Install the package") in changed(play(bed, "site", inventory, work).stdout)
    orchestrator.wait_until_enrolled(db.uuid)
    db.must_work()
    said = db.guest.run("runuser -u someone -- vm-agent sign - --timeout 200 | wc -c", data=b"a letter").text
    assert said == "256"
    assert re.findall(r"changed=(\d+)", play(bed, "site", inventory, work).stdout) == ["0"]
    wrong = {**inventory, "guests": {"hosts": {"db": {**reached, "vm_agent_package": "/nonexistent/agent.deb"}}}}
    done = play(bed, "site", wrong, work, check=False)
    assert done.returncode != 0
    assert "'make deb' builds it" in " ".join(done.stdout.split())
