"""A guest's disk with the agent's package installed, as somebody who makes images would: dpkg in a chroot, on this machine.

Under emulation the same takes minutes for each guest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from testbed.build import GUEST_DISK
from testbed.errors import TestbedError
from testbed.tools import run

_KEPT = 2  # disks of earlier packages


def agent_disk(images: Path, package: Path) -> Path:
    """The disk for this ``.deb``, made once for each content. Raises TestbedError."""
    digest = hashlib.sha256(package.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = images / "guests"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"agent-{digest}.ext4"
    if target.exists():
        target.touch()
        return target
    if os.geteuid() != 0:
        raise TestbedError("a guest's disk with the agent installed is made in a chroot: run this as root")
    with tempfile.TemporaryDirectory(prefix="sf-guest-", dir=folder) as name:
        root, unfinished = Path(name) / "root", Path(name) / "disk"
        root.mkdir()
        run(["debugfs", "-R", f"rdump / {root}", images / "guest.ext4"])
        shutil.copyfile(package, root / "agent.deb")
        # Maintainer scripts run in the chroot; no service is started there.
        run(
            ["dpkg", f"--root={root}", "--install", root / "agent.deb"],
            environment={"DEBIAN_FRONTEND": "noninteractive"},
        )
        (root / "agent.deb").unlink()
        for shared in ("tmp", "var/tmp"):
            (root / shared).chmod(0o1777)  # debugfs forgets these bits
        run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-d", root, unfinished, GUEST_DISK])
        unfinished.chmod(0o400)
        unfinished.rename(target)
    for old in sorted(folder.glob("agent-*.ext4"), key=lambda path: path.stat().st_mtime)[: -1 - _KEPT]:
        old.unlink()
    return target
