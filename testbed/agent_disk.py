"""Guests' disks with packages installed, as somebody who makes images would: dpkg in a chroot, on this machine.

Under emulation the same takes minutes for each guest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from secfunet.service.lock import process_lock
from testbed.build import GUEST_DISK
from testbed.errors import TestbedError
from testbed.tools import run

_KEPT = 2  # disks of earlier packages


def agent_disk(images: Path, package: Path) -> Path:
    """The disk with this ``.deb`` of the agent, made once for each content. Raises TestbedError."""
    return _disk(images, "agent", package.read_bytes(), lambda root: [package])


def cloud_init_disk(images: Path) -> Path:
    """A disk with the distribution's cloud-init, and without the agent; made once. Raises TestbedError."""
    return _disk(images, "cloud-init", b"", lambda root: _with_dependencies("cloud-init", root))


def _with_dependencies(package: str, root: Path) -> Iterable[Path]:
    """What apt says is missing in ``root``, from this machine's own package sources."""
    folder = root.parent / "archives"
    (folder / "partial").mkdir(parents=True)
    options = {"Dir::State::status": root / "var/lib/dpkg/status", "Dir::Cache::archives": folder}
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    words += ["-o", "APT::Sandbox::User=root"]
    run(["apt-get", "-qq", "install", "--yes", "--download-only", "--no-install-recommends", *words, package])
    return sorted(folder.glob("*.deb"))


def _disk(images: Path, kind: str, content: bytes, packages: Callable[[Path], Iterable[Path]]) -> Path:
    digest = hashlib.sha256(content + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = images / "guests"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{kind}-{digest}.ext4"
    if target.exists():
        target.touch()
        return target
    if os.geteuid() != 0:
        raise TestbedError("packages are installed on a guest's disk in a chroot: run this as root")
    with process_lock(folder / f"{kind}.lock", lambda _: None):
        if not target.exists():
            _make(target, images, packages)
        for old in sorted(folder.glob(f"{kind}-*.ext4"), key=lambda path: path.stat().st_mtime)[: -1 - _KEPT]:
            old.unlink()
    return target


def _make(target: Path, images: Path, packages: Callable[[Path], Iterable[Path]]) -> None:
    with tempfile.TemporaryDirectory(prefix="sf-guest-", dir=target.parent) as name:
        root, unfinished = Path(name) / "root", Path(name) / "disk"
        root.mkdir()
        run(["debugfs", "-R", f"rdump / {root}", images / "guest.ext4"])
        for shared in ("tmp", "var/tmp"):
            (root / shared).chmod(0o1777)  # debugfs forgets these bits
        (root / "packages").mkdir()
        copies = [Path(shutil.copy(package, root / "packages")) for package in packages(root)]
        # Maintainer scripts run in the chroot; no service is started there.
        run(["dpkg", f"--root={root}", "--install", *copies], environment={"DEBIAN_FRONTEND": "noninteractive"})
        shutil.rmtree(root / "packages")
        if (settings := root / "etc/cloud/cloud.cfg.d").exists():
            # No locales are in the image: cloud-init would call its run a failed one.
            (settings / "90_testbed.cfg").write_text("locale: false\n")
        run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-d", root, unfinished, GUEST_DISK])
        unfinished.chmod(0o400)
        unfinished.rename(target)
