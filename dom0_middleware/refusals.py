"""A bound on how fast one guest can fill the audit log with its own refusals: a full disk would refuse every other guest, too.

Permitted operations need no such bound: policy has rates for them. Far above what an honest agent ever causes, refusals are counted
instead of recorded, and the next record that there is room for says how many they were.
"""

from __future__ import annotations

from collections.abc import Callable

from secfunet.service.rate import TokenBucket

BURST = 2000.0  # records
PER_SECOND = 20.0


class RefusalMeter:
    """For one domain: ``burst`` records at once, ``per_second`` on the long run. ``monotonic``: seconds."""

    def __init__(self, monotonic: Callable[[], float], *, burst: float = BURST, per_second: float = PER_SECOND) -> None:
        self._bucket = TokenBucket(per_second, burst, monotonic)
        self._left_out = 0

    def admit(self) -> str | None:
        """None: count this refusal, do not record it. Else what to add to its record ("" or the number of those before it)."""
        if self._bucket.take() > 0:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        return f"after {left_out} refusals that were only counted" if left_out else ""
