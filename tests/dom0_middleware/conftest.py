from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.dom0_middleware.world import World, running_world


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with running_world() as made:
        yield made
