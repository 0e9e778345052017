"""The caller's time, and pauses within it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

from gose_client.errors import DeadlineError, GridRefusedError
from secfunet.rpc.reasons import Healing

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


class Deadline:
    """A moment of the event loop's clock. What failed last is remembered: it is why the time ran out."""

    def __init__(self, timeout: float) -> None:
        self._end = asyncio.get_running_loop().time() + timeout
        self._pause = FIRST_PAUSE
        self.cause: BaseException | None = None

    @property
    def left(self) -> float:
        """Seconds, never negative."""
        return max(0.0, self._end - asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Cancels its body when the time is over, and raises DeadlineError."""
        scope = asyncio.timeout_at(self._end)
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineError(self.cause) from self.cause

    async def pause(self, cause: BaseException, at_least: float = 0.0) -> None:
        """Waits before the next attempt: longer each time, ``at_least`` so long (what the grid advised), and not all callers equally long.

        Raises DeadlineError if no time is left for it.
        """
        self.cause = cause
        part = secrets.randbelow(1000) / 2000
        # What the grid said is a minimum; many callers were told the same at the same moment.
        pause = max(self._pause * (0.5 + part), at_least * (1 + part))
        if pause >= self.left:
            raise DeadlineError(cause) from cause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        await asyncio.sleep(pause)

    async def pause_or_refuse(self, error: GridRefusedError) -> None:
        """Waits as the grid advised. Raises DeadlineError if no time is left for it; ``error`` itself if the grid has too much to do: its
        advice is worth more to the caller than the news that his time would not have sufficed.
        """
        try:
            await self.pause(error, error.retry_after or 0.0)
        except DeadlineError:
            if error.healing is Healing.ROOM:
                raise error from None
            raise
