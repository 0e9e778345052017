"""The programs of the machine below, and what is said if they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from testbed import places
from testbed.errors import MissingTools, TestbedError

PACKAGES = places.ROOT / "debian-packages.txt"
INSTALL = places.ROOT / "scripts" / "debian-packages"
# A program of each package: it may be here in another way than by its package.
_PROGRAMS = {
    "cpio": "cpio",
    "kmod": "depmod",
    "lz4": "lz4",
    "mmdebstrap": "mmdebstrap",
    "openssh-client": "ssh",
    "qemu-system-x86": "qemu-system-x86_64",
    "qemu-utils": "qemu-img",
    "zstd": "zstd",
}


MEMORY = 5 * 10**9  # bytes: a Xen host and one for the grid, with QEMU's own
DISK = 8 * 10**9  # bytes: images, saved states, and what two running testbeds write


def require_machine(*, memory: int | None = None, disk: int | None = None) -> None:
    """Raises TestbedError, which says what there is too little of: bytes of memory that are available, of disk that are free (None: this
    machine's), or the right to make images of guests.
    """
    place = next(path for path in (places.folder(), *places.folder().parents) if path.exists())
    disk = shutil.disk_usage(place).free if disk is None else disk
    memory = _available_memory() if memory is None else memory
    for what, there, needed in (("memory that is available", memory, MEMORY), (f"free disk in {place}", disk, DISK)):
        if there < needed:
            raise TestbedError(f"a testbed needs {needed / 1e9:.0f} GB of {what}; there are {there / 1e9:.1f}")
    if os.geteuid() != 0:
        raise TestbedError("packages are installed on guests' disks in a chroot: run this as root")


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def missing_packages() -> tuple[str, ...]:
    """Debian packages that ``build`` and ``up`` need and that are not here."""
    missing = []
    for line in places.lines(PACKAGES):
        group, package = line.split()
        if group != "testbed":
            continue
        program = _PROGRAMS.get(package)
        if program is not None and shutil.which(program, path=_path()):
            continue
        query = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True, check=False
        )
        if query.stdout != "install ok installed":
            missing.append(package)
    return tuple(missing)


def require_tools(*, install: bool = False) -> None:
    """Raises MissingTools, which names the packages; with ``install`` and the right to do it, installs them first."""
    missing = missing_packages()
    if missing and install and os.geteuid() == 0:
        print(f"testbed: installing Debian packages: {' '.join(missing)}", file=sys.stderr, flush=True)
        run([INSTALL, "testbed"])
        missing = missing_packages()
    if missing:
        raise MissingTools(
            f"the testbed needs Debian packages that are not installed here: {' '.join(missing)}\n"
            f"run as root: apt-get install --no-install-recommends {' '.join(missing)}"
        )


def run(
    command: Sequence[str | Path],
    *,
    data: bytes | None = None,
    cwd: Path | None = None,
    timeout: float = 1800,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """The output of a program. Raises TestbedError with the end of what it said if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            capture_output=True,
            cwd=cwd,
            timeout=timeout,
            check=False,
            env={**os.environ, "PATH": _path(), **(environment or {})},
        )
    except FileNotFoundError:
        raise TestbedError(f"{words[0]} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise TestbedError(f"{' '.join(words[:3])} … did not end within {timeout:g} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-15:]
        raise TestbedError("\n".join([f"{' '.join(words[:4])} … ended with {done.returncode}", *said]))
    return done.stdout


def _path() -> str:
    # depmod and mke2fs lie where an ordinary user does not look.
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
