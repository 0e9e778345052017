"""What the agent's tests share."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.vm_agent.double import Grid, MiddlewareDouble
from vm_agent.options import AgentOptions
from vm_agent.settings import AgentSettings


@pytest.fixture(scope="session")
def grid() -> Grid:
    return Grid()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a Unix socket's has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vma"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def middleware(folder: Path, grid: Grid) -> AsyncIterator[MiddlewareDouble]:
    async with MiddlewareDouble(folder, grid) as double:
        double.invite()
        yield double


@pytest.fixture
def options(folder: Path) -> AgentOptions:
    return AgentSettings.model_validate({}, context={"folder": folder}).options()


async def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Waits for the condition; fails after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
