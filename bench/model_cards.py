"""Many model cards in one process: ``python -m bench.model_cards FILE...``, each FILE the settings of one card.

A card that serves somebody is a process of its own. Hundreds of them to be measured against need not be: each is the same card with a
socket, a store and a speed of its own, and waits most of its time. What they compute they share a core for, as they would not in life.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from secfunet.service.daemon import run_daemon
from secfunet.service.logs import configure_logs
from secfunet.service.settings import load_settings
from secure_element.serving import serving
from secure_element.settings import CardSettings


@asynccontextmanager
async def _serving_all(files: Sequence[Path]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for file in files:
            settings = load_settings(CardSettings, file)
            await stack.enter_async_context(serving(settings, settings.store_key.read()))
        yield


async def _make_service() -> AbstractAsyncContextManager[object]:
    return _serving_all([Path(name) for name in sys.argv[1:]])


if __name__ == "__main__":
    configure_logs("error")
    run_daemon(_make_service)
