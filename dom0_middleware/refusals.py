"""Bounds on what a guest can do with its own refusals.

How fast it can fill the audit log with them: a full disk would refuse every other guest, too.

Permitted operations need no such bound: policy has rates for them. Far above what an honest agent ever causes, refusals are counted
instead of recorded, and the next record that there is room for says how many they were.
"""

from __future__ import annotations

from collections.abc import Callable

from secfunet.service.rate import TokenBucket

# Refusals that are answered at once; those beyond are answered late, so that whoever has himself refused in a loop waits.
# Calls that their caller gave up, whose connection ended, or of no method: at once all that a connection may have in work, twice.
WASTED_BURST, WASTED_PER_SECOND = 512.0, 10.0
CALLS_BURST, CALLS_PER_SECOND = 50.0, 20.0
OPERATIONS_BURST, OPERATIONS_PER_SECOND = 2000.0, 400.0
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


class RefusalPace:
    """How late a refusal of one domain is answered: ``burst`` at once, then ``per_second`` on the long run, each in its turn.

    A refusal costs dom0 time, and nobody else pays for it: policy has rates for what is permitted, calls have none. Those who wait for an
    answer are bounded by the streams and connections of a server.
    """

    def __init__(self, monotonic: Callable[[], float], *, burst: float, per_second: float) -> None:
        self._monotonic = monotonic
        self._burst = burst / per_second
        self._each = 1 / per_second
        self._next = monotonic() - self._burst

    def delay(self, refused: int = 1) -> float:
        """Seconds to wait before the answer to ``refused`` more."""
        now = self._monotonic()
        self._next = max(self._next, now - self._burst) + refused * self._each
        return max(0.0, self._next - now)
