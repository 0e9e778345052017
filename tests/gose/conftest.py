"""One grid with its cards for each module that asks for one; the running service is each test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from tests.gose.grid import TestGrid, new_grid


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short path, for Unix sockets."""
    with TemporaryDirectory(prefix="gose-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(short_folder: Path) -> AsyncIterator[TestGrid]:
    """Three VMs (one to be revoked), two server cards, hypervisors hv-a and hv-b."""
    async with new_grid(short_folder, vms=("vm-1", "vm-2", "vm-revoked")) as grid:
        grid.hypervisor("hv-a")
        grid.hypervisor("hv-b")
        yield grid
