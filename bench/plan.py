"""How long to measure."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from bench.rows import Row


@dataclass(slots=True)
class Plan:
    """``rounds`` of ``seconds`` each; ``rows`` are those measured so far in this run, by name; ``notes`` is the table's legend."""

    rounds: int = 5
    seconds: float = 2.0
    bulk_bytes: int = 64 << 20
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that everything runs."""
        return cls(rounds=3, seconds=0.3, bulk_bytes=8 << 20)

    def add(self, row: Row) -> Row:
        """Keeps the row for the table and for comparisons."""
        self.rows[row.name] = row
        return row


def rates(plan: Plan, operation: Callable[[], object]) -> list[float]:
    """How often a second ``operation`` runs, one after the other, in each round."""
    found = []
    for _ in range(plan.rounds):
        done, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < plan.seconds:
            operation()
            done += 1
        found.append(done / passed)
    return found


async def times(plan: Plan, operation: Callable[[], Awaitable[object]]) -> list[float]:
    """Milliseconds that ``operation`` takes, alone: the median of each round."""
    found = []
    for _ in range(plan.rounds):
        taken: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < plan.seconds / 2 or not taken:
            before = time.perf_counter()
            await operation()
            taken.append((time.perf_counter() - before) * 1000)
        found.append(sorted(taken)[len(taken) // 2])
    return found
