"""A node with two cards for each module that asks for one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from tests.gose_racs.node import TestNode, new_node


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short path, for Unix sockets."""
    with TemporaryDirectory(prefix="racs-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(short_folder: Path) -> AsyncIterator[TestNode]:
    """Cards b-1 and b-2, each with a P-256 key under the label "vm"."""
    async with new_node(short_folder) as node:
        yield node
