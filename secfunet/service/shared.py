"""One question for all who ask it at the same time, and its answer, or its failure, for a while after."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Shared(Generic[Answer]):
    """``ask`` is called at most once at a time, and not again within ``keep`` seconds of its end."""

    def __init__(self, ask: Callable[[], Awaitable[Answer]], *, keep: float) -> None:
        self._ask = ask
        self._keep = keep
        self._asking: asyncio.Task[Answer] | None = None
        self._until = 0.0  # of the event loop's clock

    async def answer(self, timeout: float) -> Answer:
        """The answer. Raises what ``ask`` raises, and TimeoutError after ``timeout`` seconds, for this caller alone."""
        loop = asyncio.get_running_loop()
        if self._asking is None or (self._asking.done() and loop.time() >= self._until):
            self._asking = asyncio.ensure_future(self._asked())
            self._asking.add_done_callback(_seen)
        async with asyncio.timeout(timeout):
            return await asyncio.shield(self._asking)

    async def _asked(self) -> Answer:
        try:
            return await self._ask()
        finally:
            self._until = asyncio.get_running_loop().time() + self._keep


def _seen(task: asyncio.Task[Answer]) -> None:
    if not task.cancelled():
        task.exception()  # each caller is told; there may be none left
