"""Where the testbed keeps everything: one folder outside the tree."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "testbed" / "images"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,15}")


def folder() -> Path:
    """``$SECFUNET_TESTBED``, else a folder in the user's cache."""
    chosen = os.environ.get("SECFUNET_TESTBED")
    if chosen:
        return Path(chosen).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "secfunet" / "testbed"


def images(key: str) -> Path:
    """The images of one content key."""
    return folder() / "images" / key


def states(key: str) -> Path:
    """Saved hosts: ``<state>/<host>.qcow2``."""
    return images(key) / "states"


def bed(name: str) -> Path:
    """Of one running bed. Raises ValueError for a name that is none."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no name for a testbed: 1 to 16 of a-z, 0-9 and -")
    return folder() / "beds" / name


def lines(path: Path) -> tuple[str, ...]:
    """The lines of a list, without comments."""
    text = path.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in (line.strip() for line in text) if line and not line.startswith("#"))
