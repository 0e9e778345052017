"""Which locked distributions an extra of ours needs, and their wheels: each one's SHA-256 stands in requirements.lock.

The lock has everything for every place. What one extra needs of it is found by following the requirements of the distributions that are
installed here, which are those of the lock.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class LockError(Exception):
    """The lock and what is installed here, or what was downloaded, do not agree; the text says how."""


def needed(distribution: str, extras: frozenset[str]) -> set[str]:
    """Canonical names of all that ``distribution[extras]`` needs, directly or not; without itself."""
    found: set[str] = set()
    _follow(distribution, extras, found)
    return found


def _follow(distribution: str, extras: frozenset[str], found: set[str]) -> None:
    for text in requires(distribution) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            _follow(name, frozenset(requirement.extras), found)


def entries(lock: Path, names: set[str]) -> dict[str, str]:
    """The lock's text for each of ``names``, with its version and hashes. Raises LockError if one is not in the lock."""
    blocks = re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8"))
    known = {str(canonicalize_name(block.partition("==")[0])): block for block in blocks if "==" in block}
    missing = sorted(names - known.keys())
    if missing:
        raise LockError(f"not in {lock.name}: {', '.join(missing)}: run make lock")
    return {name: known[name] for name in sorted(names)}


def fetch(wanted: dict[str, str], folder: Path) -> list[Path]:
    """A wheel in ``folder`` for each entry; downloaded unless it is there. Raises LockError if a hash is another than the lock's.

    ``pip`` takes only what has a hash of the lock; what was there before is held to the same here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: block for name, block in wanted.items() if _kept(block, folder) is None}
    if missing:
        requirements = folder / "missing.txt"
        requirements.write_text("\n".join(missing.values()) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--require-hashes", "--only-binary", ":all:", "--no-deps", "--dest", str(folder)]
        try:
            subprocess.run([*command, "--requirement", str(requirements)], check=True)
        except subprocess.CalledProcessError:
            raise LockError(f"pip refused, or could not fetch: {', '.join(missing)}") from None
        requirements.unlink()
    wheels = []
    for name, block in wanted.items():
        wheel = _kept(block, folder)
        if wheel is None:
            raise LockError(f"{name}: no wheel for this Python and machine with a hash of the lock")
        wheels.append(wheel)
    return wheels


def _kept(block: str, folder: Path) -> Path | None:
    hashes = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", block))
    name, _, version = block.split()[0].partition("==")
    prefix = f"{re.sub(r'[-_.]+', '_', name)}-{version}-".lower()
    for wheel in sorted(folder.glob("*.whl")):
        if wheel.name.lower().startswith(prefix) and hashlib.sha256(wheel.read_bytes()).hexdigest() in hashes:
            return wheel
    return None
