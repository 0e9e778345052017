"""Providers in threads, and Node's library as its lock file says, installed once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop_openid.places import OurProvider, TheirProvider, serving

NODE_SOURCES = Path(__file__).parent / "node"
BUILD = Path(__file__).parents[2] / ".build" / "node"


@pytest.fixture
def ours() -> Iterator[OurProvider]:
    provider = OurProvider()
    with serving(provider.answer) as origin:
        provider.start(origin)
        yield provider


@pytest.fixture
def theirs() -> Iterator[TheirProvider]:
    provider = TheirProvider()
    with serving(provider.answer) as origin:
        provider.start(origin)
        yield provider


@pytest.fixture(scope="session")
def node_relying_party() -> Path:
    """The script beside its installed modules. Installed by ``npm ci`` when the lock file has changed."""
    npm = shutil.which("npm")
    assert npm is not None, "the interoperability tests need Node and npm"
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = (NODE_SOURCES / "package-lock.json").read_bytes()
    stamp, wanted = BUILD / ".installed", hashlib.sha256(lock).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NODE_SOURCES / name, BUILD / name)
        subprocess.run([npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=BUILD, check=True, timeout=90)
        stamp.write_text(wanted)
    shutil.copy(NODE_SOURCES / "relying_party.js", BUILD / "relying_party.js")
    return BUILD / "relying_party.js"
