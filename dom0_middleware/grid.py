"""The daemon with everything real: the hypervisor's card, and the client of the grid that uses it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from dom0_middleware.card import hypervisor_card
from dom0_middleware.identity import CardHypervisorIdentity
from dom0_middleware.server import MiddlewareService
from dom0_middleware.settings import MiddlewareSettings
from gose_client import GoseClient

if TYPE_CHECKING:
    from dom0_middleware.sessions import Grid


@contextlib.asynccontextmanager
async def run_middleware(
    settings: MiddlewareSettings, *, read_again: Callable[[], MiddlewareSettings] | None = None
) -> AsyncGenerator[MiddlewareService, None]:
    """Runs while the context lasts. Neither card nor grid need be there to start: whoever needs them finds out.

    ``read_again``: see ``MiddlewareService``.
    """
    cards = hypervisor_card(settings.card)
    try:
        async with GoseClient(settings.grid, cards) as client:
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
