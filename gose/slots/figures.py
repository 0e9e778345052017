"""What a card has done, how often it failed, and how long it took: for an administrator's eyes, and for Prometheus."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

RECENT: Final = 512  # samples that a quantile is taken of


class Recent:
    """The last RECENT durations, in seconds."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """The oldest is forgotten."""
        self._samples.append(seconds)

    def quantiles(self) -> Quantiles | None:
        """None before the first sample. May be called from any thread."""
        samples = sorted(self._samples)
        if not samples:
            return None
        return Quantiles(_nearest_rank(samples, 50), _nearest_rank(samples, 99))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The median and the 99th percentile (nearest rank), in seconds."""

    p50: float
    p99: float


def _nearest_rank(samples: list[float], percent: int) -> float:
    return samples[max(0, -(-len(samples) * percent // 100) - 1)]


@dataclass(eq=False, slots=True)
class CardFigures:
    """Of one card since the grid was started. An operation of a server card is a lease (a handshake, most often).

    ``done``: operations that succeeded; ``errors``: those that did not, by reason. ``waited``: jobs in the queue; ``worked``: in the card,
    by operation.
    """

    done: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    busy_seconds: float = 0.0
    waited: Recent = field(default_factory=Recent)
    worked: Recent = field(default_factory=Recent)

    @property
    def operations(self) -> int:
        """All that the card was given."""
        return self.done + self.errors.total()

    def did(self, operations: int = 1) -> None:
        """So many succeeded."""
        self.done += operations

    def failed(self, reason: str, operations: int = 1) -> None:
        """So many did not."""
        self.errors[reason] += operations

    def job_ended(self, *, waited: float, worked: float, operations: int) -> None:
        """A job of so many operations, waited for and worked on so long (seconds)."""
        self.busy_seconds += worked
        self.waited.add(waited)
        self.worked.add(worked / operations)
