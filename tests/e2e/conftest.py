"""One installation for all tests of a module; what a test kills or stops it starts again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from demo.stack import Stack


@pytest.fixture(scope="module")
def folder() -> AsyncIterator[Path]:
    """A short path: the sockets of a domain's channel lie deep in it."""
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    yield path / "i"
    shutil.rmtree(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(folder: Path) -> AsyncIterator[Stack]:
    """Two VMs on the first of two hosts."""
    async with Stack(folder, vms=("web", "db"), hypervisors=("xen-1", "xen-2")) as running:
        yield running
