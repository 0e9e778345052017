"""The wheels that a host installs from, without a network: the project's own, and those of what it depends on."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from release import PLACES, ROOT
from release.locked import LockError, entries, needed
from secfunet.service.files import write_atomically

LOCK = ROOT / "requirements.lock"


def own_wheel(out: Path) -> Path:
    """Builds the project's wheel into ``out``. Raises LockError with what the build said."""
    with tempfile.TemporaryDirectory(prefix="sf-wheel-") as folder:
        _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder])
        (wheel,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        target = out / wheel.name
        write_atomically(target, wheel.read_bytes(), mode=0o644)
        return target


def locked_entries() -> dict[str, str]:
    """The lock's text for each distribution that a place needs."""
    return entries(LOCK, needed("secfunet", PLACES))


def collect(target: Path) -> None:
    """Every dependency of every place, held to the lock's hashes; what has no wheel (libvirt-python) is compiled here.

    ``requirements.lock`` beside the wheels has the hash of each, so that a host can hold them to it in turn. A folder that was made of the
    same lock is left as it is. Raises LockError.
    """
    wanted = "\n".join(locked_entries().values()) + "\n"
    made_of = target / "made-of.txt"  # the last that is written
    target.mkdir(parents=True, exist_ok=True)
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that release at once
        if not made_of.is_file() or made_of.read_text(encoding="utf-8") != wanted:
            _collect(target, wanted, made_of)


def _collect(target: Path, wanted: str, made_of: Path) -> None:
    made_of.unlink(missing_ok=True)
    for old in target.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="sf-wheels-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(wanted, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*command, "--require-hashes", "--wheel-dir", str(target), "--requirement", str(requirements)])
    # What was compiled here has a hash of its own; all others were held to the project's lock just now.
    lines = []
    for wheel in sorted(target.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    (target / "requirements.lock").write_text("".join(lines), encoding="utf-8")
    made_of.write_text(wanted, encoding="utf-8")


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise LockError(f"{' '.join(command[1:4])} …: {finished.stderr.strip() or finished.stdout.strip()}")
