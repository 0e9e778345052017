"""Token buckets: how often something may happen, for all together or for each owner. Time is passed in, in seconds."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_OWNERS: Final = 10_000


class TokenBucket:
    """``burst`` events at once, ``per_second`` on the long run. A new bucket is full."""

    __slots__ = ("_at", "_level", "burst", "monotonic", "per_second")

    def __init__(self, per_second: float, burst: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.per_second = per_second
        self.burst = burst
        self.monotonic = monotonic
        self._level = float(burst)
        self._at = monotonic()

    def take(self) -> float:
        """0.0 if the event may happen now (it is counted), else the seconds until one may."""
        now = self.monotonic()
        self._level = min(float(self.burst), self._level + (now - self._at) * self.per_second)
        self._at = now
        if self._level < 1.0:
            return (1.0 - self._level) / self.per_second
        self._level -= 1.0
        return 0.0

    def spend(self, cost: float) -> float:
        """Counts what has happened already, on credit if need be. Returns the seconds to wait until the debt is paid, 0.0 if none."""
        now = self.monotonic()
        self._level = min(float(self.burst), self._level + (now - self._at) * self.per_second) - cost
        self._at = now
        return max(0.0, -self._level / self.per_second)


class TokenBuckets:
    """A bucket for each owner. Of more than ``max_owners`` the one that took nothing for longest is forgotten: it is the fullest."""

    def __init__(
        self,
        per_second: float,
        burst: float,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        max_owners: int = MAX_OWNERS,
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._monotonic = monotonic
        self._max_owners = max_owners
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, owner: str) -> float:
        """As TokenBucket.take(), from this owner's bucket."""
        bucket = self._buckets.get(owner)
        if bucket is None:
            bucket = self._buckets[owner] = TokenBucket(self._per_second, self._burst, self._monotonic)
            if len(self._buckets) > self._max_owners:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(owner)
        return bucket.take()
