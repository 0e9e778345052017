"""Figures of a card: bounded, and the quantiles are those of the last samples."""

from __future__ import annotations

import pytest

from gose.overview.pulse import pulse_of
from gose.overview.table import duration
from gose.running import RunningCard, RunningGrid
from gose.slots.figures import RECENT, CardFigures, Quantiles, Recent


def test_quantiles_are_of_the_last_samples() -> None:
    recent = Recent()
    assert recent.quantiles() is None
    recent.add(3.0)
    assert recent.quantiles() == Quantiles(3.0, 3.0)
    for _ in range(3 * RECENT):
        recent.add(1000.0)
    for number in range(RECENT):
        recent.add(float(number))
    # 512 samples 0 … 511: nearest ranks 256 and 507, counted from 1.
    assert recent.quantiles() == Quantiles(255.0, 506.0)


def test_operations_are_done_or_failed() -> None:
    figures = CardFigures()
    figures.did(3)
    figures.failed("CARD_LOST", 2)
    figures.job_ended(waited=0.5, worked=1.0, operations=5)
    assert (figures.operations, figures.done, figures.errors["CARD_LOST"], figures.busy_seconds) == (5, 3, 2, 1.0)
    assert figures.worked.quantiles() == Quantiles(0.2, 0.2)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.0004123, "0.412 ms"), (0.35, "350 ms"), (0.9999, "1 s"), (1.4, "1.4 s"), (75, "75 s")],
)
def test_durations_as_a_person_reads_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def report(time: float, operations: int, errors: int, busy: float, *, pid: int = 7) -> RunningGrid:
    card = RunningCard(
        seid="a",
        state="in_service",
        cause="",
        queue="a",
        jobs_done=operations,
        operations=operations,
        errors={"CARD_LOST": errors} if errors else {},
        busy_seconds=busy,
    )
    return RunningGrid(
        pid=pid,
        version="1",
        started_at=1.0,
        time=time,
        streams=0,
        cards=(card,),
        queues={"a": 0},
        refused={"a": errors},
        sessions=(),
    )


def test_a_pulse_is_between_two_reports_of_one_grid() -> None:
    first, second = report(10.0, 100, 1, 5.0), report(12.0, 110, 4, 6.0)
    assert pulse_of(None, second) is None
    assert pulse_of(first, None) is None
    assert pulse_of(second, first) is None
    assert pulse_of(report(10.0, 0, 0, 0.0, pid=8), second) is None, "it was started anew"
    pulse = pulse_of(first, second)
    assert pulse is not None
    assert (pulse.per_second, pulse.errors, pulse.refused) == (5.0, 3, 3)
    assert pulse.cards["a"].busy == 0.5
    long = pulse_of(first, report(12.0, 101, 1, 45.0))
    assert long is not None
    assert long.cards["a"].busy == 1.0, "a job that began long before"
