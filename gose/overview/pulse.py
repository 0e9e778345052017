"""What a running grid did between two looks at it."""

from __future__ import annotations

from dataclasses import dataclass

from gose.running import RunningGrid


@dataclass(frozen=True, slots=True)
class CardPulse:
    """Of one card: operations a second, new errors, and the share of the time that jobs occupied it (0 to 1)."""

    per_second: float
    errors: int
    busy: float


@dataclass(frozen=True, slots=True)
class Pulse:
    """Of all cards, by SEID, and of the grid: operations a second, new errors, jobs that were refused."""

    cards: dict[str, CardPulse]
    per_second: float
    errors: int
    refused: int


def pulse_of(before: RunningGrid | None, now: RunningGrid | None) -> Pulse | None:
    """None without two reports of the same grid, one after the other."""
    if before is None or now is None or (before.pid, before.started_at) != (now.pid, now.started_at):
        return None
    seconds = now.time - before.time
    if seconds <= 0:
        return None
    earlier = {card.seid: card for card in before.cards}
    cards = {}
    for card in now.cards:
        old = earlier.get(card.seid)
        if old is None:
            continue
        cards[card.seid] = CardPulse(
            per_second=(card.operations - old.operations) / seconds,
            errors=sum(card.errors.values()) - sum(old.errors.values()),
            # What a job took is counted when it ends: a long one may seem to have taken more than the time between.
            busy=min(1.0, (card.busy_seconds - old.busy_seconds) / seconds),
        )
    return Pulse(
        cards,
        per_second=sum(card.per_second for card in cards.values()),
        errors=sum(card.errors for card in cards.values()),
        refused=sum(now.refused.values()) - sum(before.refused.values()),
    )
