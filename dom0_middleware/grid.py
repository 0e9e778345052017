"""The daemon with everything real: the hypervisor's card, and the client of the grid that uses it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from dom0_middleware.card import hypervisor_card
from dom0_middleware.identity import CardHypervisorIdentity
from dom0_middleware.server import MiddlewareService
from dom0_middleware.settings import MiddlewareSettings
from dom0_middleware.start_checks import grid_authority, require_right
from gose_client import GoseClient

if TYPE_CHECKING:
    from dom0_middleware.sessions import Grid

START_PATIENCE = 5.0  # seconds for each step of the look at the grid when the daemon starts


@contextlib.asynccontextmanager
async def run_middleware(
    settings: MiddlewareSettings, *, read_again: Callable[[], MiddlewareSettings] | None = None
) -> AsyncGenerator[MiddlewareService, None]:
    """Runs while the context lasts. Card and grid are tried first, but need not be there to start: what is merely away is logged.

    Raises SettingUnusable for a setting that they show to be wrong. ``read_again``: see ``MiddlewareService``.
    """
    grid_authority(settings.grid.authority, now=time.time())
    cards = hypervisor_card(settings.card)
    try:
        async with GoseClient(settings.grid, cards) as client:
            require_right(await client.look(timeout=START_PATIENCE), settings)
            grid: Grid = client
            async with MiddlewareService(
                settings,
                grid=grid,
                hypervisor_identity=CardHypervisorIdentity(cards),
                read_again=read_again,
            ) as service:
                yield service
    finally:
        await cards.close()
