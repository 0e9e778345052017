"""A flood must not become a flood of the log: of what anybody can have refused at will, a line a second says how many there were."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from grpc import StatusCode

from gose.errors import Refusal

INTERVAL: Final = 1.0  # seconds between two lines for one reason


def is_overload(refusal: Refusal) -> bool:
    """Whether nothing was done because there is too much to do."""
    return refusal.code is StatusCode.RESOURCE_EXHAUSTED


class FloodLog:
    """Says which refusals are written down. Reasons are few and ours; never a word of whoever is refused."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._written: dict[str, float] = {}
        self._unwritten: dict[str, int] = {}

    def count(self, reason: str, refused: int = 1) -> int:
        """``refused`` more were. Returns how many a line is to be written for now, those before included; 0: none."""
        pending = self._unwritten.get(reason, 0) + refused
        now = self._monotonic()
        last = self._written.get(reason)
        if last is not None and now - last < INTERVAL:
            self._unwritten[reason] = pending
            return 0
        self._written[reason] = now
        self._unwritten[reason] = 0
        return pending
