"""What preparing a checkout does to the machine: each target installs its own packages, and nothing starts by itself afterwards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = {"demo", "pcsc", "test", "peers", "testbed"}
SERVICE = re.compile(r"/(?:lib/systemd/system/[^/]+\.(?:service|socket|timer)|etc/init\.d/[^/]+)$")


def groups() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (ROOT / "debian-packages.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            group, package = line.split()
            found.setdefault(group, []).append(package)
    return found


def test_each_package_is_in_one_known_group() -> None:
    found = groups()
    assert found.keys() <= GROUPS
    packages = [package for group in found.values() for package in group]
    assert sorted(packages) == sorted(set(packages))


def test_the_demonstrations_packages_bring_no_service() -> None:
    for package in groups()["demo"]:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
        assert [path for path in listed.stdout.splitlines() if SERVICE.search(path)] == [], package


def test_the_demonstrations_lock_is_a_part_of_the_whole() -> None:
    pinned = re.compile(r"^(\S+)==(\S+)", re.MULTILINE)
    part, whole = (
        dict(pinned.findall((ROOT / name).read_text())) for name in ("requirements-demo.lock", "requirements.lock")
    )
    assert part.items() <= whole.items()
    assert not {"ansible-core", "mypy", "pytest", "ruff", "pyscard"} & part.keys()


# What a package's installation does to /etc, without one: enables what it brings, next to what was enabled before.
FAKE_APT = """#!/bin/sh
case "$*" in *install*) ;; *) exit 0 ;; esac
ls /usr/sbin/policy-rc.d >/dev/null || exit 1
mkdir -p /etc/systemd/system/sockets.target.wants
ln -s /lib/systemd/system/new.service /etc/systemd/system/multi-user.target.wants/new.service
ln -s /lib/systemd/system/new.socket /etc/systemd/system/sockets.target.wants/new.socket
ln -s ../init.d/new /etc/rc2.d/S01new
"""
STAGE = """
set -e
mount --make-rprivate /
for folder in /etc/systemd/system /etc/rc2.d /usr/sbin; do
    cp -a $folder $1/copy; mount --bind $1/copy $folder; mv $1/copy $1/$(basename $folder)
done
mkdir -p /etc/systemd/system/multi-user.target.wants
rm -f /usr/sbin/policy-rc.d
ln -s /lib/systemd/system/mine.service /etc/systemd/system/multi-user.target.wants/mine.service
PATH=$1/bin:$PATH scripts/debian-packages test
find /etc/systemd/system /etc/rc2.d -type l
ls /usr/sbin/policy-rc.d 2>/dev/null || true
"""


@pytest.mark.skipif(os.getuid() != 0, reason="takes a mount namespace")
def test_what_an_installation_enables_is_not_left_enabled(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("apt-get", FAKE_APT), ("dpkg-query", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    command = ["unshare", "--mount", "bash", "-c", STAGE, "bash", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "/etc/systemd/system/multi-user.target.wants/mine.service" in done.stdout
    assert "new" not in done.stdout
    assert "policy-rc.d" not in done.stdout
    assert "setup: not enabled: new.service" in done.stderr
    assert "setup: not enabled: new.socket" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_checkout_that_may_not_be_written_is_said_to_be_one() -> None:
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(name)
        checkout.chmod(0o755)
        for part in ("debian-packages.txt", "requirements-demo.lock", "pyproject.toml", "hatch_build.py"):
            shutil.copy(ROOT / part, checkout)
        for folder in ("scripts", "protos"):
            shutil.copytree(ROOT / folder, checkout / folder)
        command = ["runuser", "-u", "nobody", "--", "scripts/setup", "demo"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout)
    assert done.returncode == 1
    assert "this folder may not be written by nobody" in done.stderr
    assert done.stderr.count("\n") == 1
