"""Builds the images, once for each content: disks and kernels of hosts and guests, and the wheels of the project's dependencies.

Everything comes from Debian's packages and from the lock file. What is built is named by a hash of what it is built from; a build that was
interrupted leaves nothing that is taken for whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from release import wheels
from secfunet.service.lock import LockHeldError, process_lock
from testbed import places, roots
from testbed.errors import TestbedError
from testbed.kernel import extract
from testbed.tools import require_tools, run

HOST_DISK, GUEST_DISK = "1800M", "700M"
HYPERVISOR = "xen-hypervisor-4.17-amd64"
_KERNELS = ("linux-image-amd64", "linux-image-cloud-amd64")
_VERSIONS_OF = (*_KERNELS, HYPERVISOR, "systemd", "libvirt-daemon", "python3", "openssh-server", "xen-utils-4.17")

Say = Callable[[str], None]


def key() -> str:
    """Names the images of the recipes, lock file and Debian packages of now: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    files = [path for path in sorted(places.RECIPES.rglob("*")) if path.is_file()]
    files += [places.ROOT / "testbed" / name for name in ("build.py", "roots.py", "kernel.py", "machine.py")]
    for path in files:
        digest.update(f"{path.relative_to(places.ROOT)}\0{path.stat().st_mode & 0o111:o}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for entry in wheels.locked_entries().values():
        digest.update(entry.encode())
    policy = subprocess.run(["apt-cache", "policy", *_VERSIONS_OF], capture_output=True, check=False).stdout
    digest.update(b"".join(line for line in policy.splitlines() if b"Candidate" in line))
    return digest.hexdigest()[:16]


def built() -> Path | None:
    """The folder of the present images; None if they have to be built."""
    folder = places.images(key())
    return folder if (folder / "complete").exists() else None


def build(say: Say = lambda line: print(line, file=sys.stderr, flush=True)) -> Path:
    """The folder of the present images, built if need be. Raises TestbedError."""
    found = built()
    if found is not None:
        return found
    require_tools(install=True)
    if sys.version_info[:2] != (3, 11):
        raise TestbedError("the wheels for Debian 12 are made with Python 3.11; run this with it")
    folder = places.images(key())
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with process_lock(_lock_of(folder), lambda pid: say(f"testbed: another build runs (pid {pid}); waiting for it")):
        if not (folder / "complete").exists():
            _build(folder, say)
    return folder


def _lock_of(folder: Path) -> Path:
    """Held by who builds ``folder``, or removes it: what is not complete there may be in work."""
    return folder.with_name(f"{folder.name}.lock")


def _build(folder: Path, say: Say) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # of a build that was interrupted: nobody else has the lock
    folder.mkdir(parents=True, mode=0o700)
    work = folder / "work"
    work.mkdir()
    begin = time.monotonic()

    def step(what: str, act: Callable[[], None]) -> None:
        started = time.monotonic()
        act()
        say(f"testbed: {what} ({time.monotonic() - started:.0f} s)")

    say("testbed: building the images; one to twelve minutes, by the machine")
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", folder / "id_ed25519"])
    host, guest = work / "host", work / "guest"
    recipes = places.RECIPES
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(step, "a host's packages", lambda: roots.bootstrap(recipes / "host-packages.txt", host)),
            pool.submit(step, "wheels", lambda: wheels.collect(work / "wheels")),
            pool.submit(step, "kernels and hypervisor", lambda: _kernels(work, folder)),
            pool.submit(step, "a guest's packages", lambda: roots.bootstrap(recipes / "guest-packages.txt", guest)),
        ]
        for job in jobs:
            job.result()
    step("the guest's disk", lambda: _guest(guest, work, folder))
    step("the host's disk", lambda: _host(host, work, folder))
    shutil.rmtree(work)
    (folder / "complete").touch()
    say(f"testbed: built in {time.monotonic() - begin:.0f} s; {_size(folder)} MiB in {folder}")


def clean(say: Say = lambda line: print(line, file=sys.stderr, flush=True)) -> None:
    """Removes every image and saved host that is not of the present content, and that nobody builds or runs now."""
    present = key()
    used = in_use()
    for folder in (places.folder() / "images").glob("*"):
        if folder.name == present or not folder.is_dir():
            continue
        if folder in used:
            say(f"testbed: {folder} stays: the testbed '{used[folder]}' runs on it")
            continue
        try:
            with process_lock(_lock_of(folder)):
                say(f"testbed: removing {folder}")
                shutil.rmtree(folder)
        except LockHeldError as error:
            say(f"testbed: {folder} stays: it is being built (pid {error.pid})")


def in_use() -> dict[Path, str]:
    """The images that running testbeds have their hosts on, with one testbed's name each."""
    used = {}
    for record in (places.folder() / "beds").glob("*/bed.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            used[Path(json.loads(record.read_text())["images"])] = record.parent.name
    return used


def _kernels(work: Path, folder: Path) -> None:
    debs = work / "debs"
    debs.mkdir()
    packages = {name: _real_package(name) for name in _KERNELS}
    run(["apt-get", "-qq", "download", *packages.values(), HYPERVISOR], cwd=debs)
    for package in (*packages.values(), HYPERVISOR):
        (deb,) = debs.glob(f"{package}_*.deb")
        (work / "unpacked" / package).mkdir(parents=True)
        run(["dpkg-deb", "-x", deb, work / "unpacked" / package])
    shutil.rmtree(debs)
    for name, alias in zip(_KERNELS, ("host", "guest"), strict=True):
        unpacked, version = work / "unpacked" / packages[name], packages[name].removeprefix("linux-image-")
        run(["depmod", "-b", unpacked, version])
        extract(unpacked / "boot" / f"vmlinuz-{version}", folder / f"vmlinux-{alias}")
        (work / f"kernel-{alias}").write_text(f"{unpacked}\n{version}\n")
    packed = work / "unpacked" / HYPERVISOR / "boot" / "xen-4.17-amd64.gz"
    (folder / "xen.elf").write_bytes(run(["zcat", packed]))


def _real_package(name: str) -> str:
    """The package with the kernel itself, that a meta package depends on."""
    for line in run(["apt-cache", "depends", name]).decode().splitlines():
        kind, _, package = line.strip().partition(": ")
        if kind == "Depends" and package.startswith("linux-image-"):
            return package
    raise TestbedError(f"apt-cache knows no kernel behind {name}")


def _guest(root: Path, work: Path, folder: Path) -> None:
    kernel, version = _kernel_of(work, "guest")
    roots.copy_modules(kernel, version, roots.GUEST_MODULES, root)
    roots.overlay(places.RECIPES / "guest", root)
    roots.prepare_systemd(root, enabled=("testbed-network.service", "testbed-guest.service"))
    roots.finish_root(
        root,
        name="guest",
        machine_id="5ec0f07e7e574bed8000000000000064",
        public_key=(folder / "id_ed25519.pub").read_text(),
        host_key=folder / "id_ed25519",
    )
    _initrd(work, "guest", ("xen-blkfront", "overlay"), folder / "initrd-guest")
    _disk(root, folder / "guest.ext4", GUEST_DISK)


def _host(root: Path, work: Path, folder: Path) -> None:
    kernel, version = _kernel_of(work, "host")
    roots.copy_modules(kernel, version, roots.HOST_MODULES, root)
    roots.overlay(places.RECIPES / "host", root)
    roots.prepare_systemd(
        root,
        enabled=("xen-init-dom0.service", "xenconsoled.service", "testbed-network.service", "testbed-ready.service"),
    )
    roots.mend_libvirt(root)
    roots.finish_root(
        root,
        name="xen1",
        machine_id="5ec0f07e7e574bed8000000000000001",
        public_key=(folder / "id_ed25519.pub").read_text(),
        host_key=folder / "id_ed25519",
    )
    (root / "etc" / "testbed").write_text("number=1\n")
    # Hosts reach guests, and one another, with the same key.
    shutil.copyfile(folder / "id_ed25519", root / "root" / ".ssh" / "id_ed25519")
    (root / "root" / ".ssh" / "id_ed25519").chmod(0o600)
    (root / "root" / ".ssh" / "config").write_text(
        "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (root / "var" / "lib" / "xen" / "images").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "vmlinux-guest", root / "boot" / "guest-vmlinux")
    shutil.copyfile(folder / "initrd-guest", root / "boot" / "guest-initrd")
    shutil.copytree(work / "wheels", root / "usr" / "share" / "secfunet" / "wheels")
    _initrd(work, "host", ("crc32c_generic", "virtio_pci", "virtio_blk", "ext4"), folder / "initrd-host")
    _disk(root, folder / "host.ext4", HOST_DISK)


def _kernel_of(work: Path, alias: str) -> tuple[Path, str]:
    unpacked, version = (work / f"kernel-{alias}").read_text().split()
    return Path(unpacked), version


def _initrd(work: Path, alias: str, modules: tuple[str, ...], target: Path) -> None:
    root = work / f"initrd-{alias}"
    for name in ("bin", "proc", "sys", "dev", "newroot", "layers"):
        (root / name).mkdir(parents=True)
    shutil.copyfile(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    (root / "bin" / "busybox").chmod(0o755)
    for applet in ("sh", "mount", "switch_root", "modprobe", "sleep", "cat", "mkdir"):
        (root / "bin" / applet).symlink_to("busybox")
    roots.copy_modules(*_kernel_of(work, alias), modules, root)
    shutil.copyfile(places.RECIPES / "initrd" / alias, root / "init")
    (root / "init").chmod(0o755)
    names = run(["find", ".", "-print0"], cwd=root)
    target.write_bytes(run(["cpio", "--null", "-o", "-H", "newc", "--quiet", "--owner=0:0"], cwd=root, data=names))


def _disk(root: Path, target: Path, size: str) -> None:
    """A raw disk without a partition table: neither root nor a loop device is needed to make it."""
    for cache in (root / "var" / "cache" / "apt", root / "var" / "lib" / "apt" / "lists"):
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
    run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-d", root, target, size])
    target.chmod(0o400)  # saved hosts are written over it: it must never change


def _size(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file()) * 512 >> 20
