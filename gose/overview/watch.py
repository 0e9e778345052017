"""The short picture that ``gose status --watch`` draws again and again: the cards, those that need a look first."""

from __future__ import annotations

from datetime import UTC, datetime

from gose.overview.picture import CardReport, CardState, Overview
from gose.overview.pulse import CardPulse, Pulse
from gose.overview.table import latency, table
from gose.overview.text import cause_of, grid_line

_LINES_AROUND = 6  # of the picture that are no cards
_STILL = CardPulse(0.0, 0, 0.0)


def as_short_text(overview: Overview, pulse: Pulse | None, *, lines: int | None = None) -> str:
    """At most ``lines`` lines (None: all cards). Cards out of service come first, then those with new errors, then the busiest."""
    cards = sorted(overview.cards, key=lambda card: _urgency(card, pulse))
    shown = cards if lines is None else cards[: max(1, lines - _LINES_AROUND)]
    parts = [
        f"{datetime.fromtimestamp(overview.now, UTC):%Y-%m-%d %H:%M:%S} UTC",
        grid_line(overview),
        _totals(overview, pulse),
        table(
            "secure elements",
            (
                "SEID",
                "CARD",
                "HOLDER",
                "WAITING",
                "A SECOND",
                "BUSY",
                "OPERATIONS",
                "ERRORS",
                "WAITED",
                "WORKED",
                "CAUSE",
            ),
            (_row(overview, card, pulse) for card in shown),
        ),
    ]
    if len(shown) < len(cards):
        parts.append(f"  … and {len(cards) - len(shown)} more")
    return "\n".join(parts)


def _totals(overview: Overview, pulse: Pulse | None) -> str:
    waiting = sum(overview.running.queues.values()) if overview.running is not None else 0
    in_service = sum(card.state is CardState.IN_SERVICE for card in overview.cards)
    first = f"{in_service} of {len(overview.cards)} cards in service, {waiting} jobs wait"
    if pulse is None:
        return first
    return (
        f"{first}; {pulse.per_second:.1f} operations a second, {pulse.errors} new errors, {pulse.refused} jobs refused"
    )


def _row(overview: Overview, card: CardReport, pulse: Pulse | None) -> tuple[str, ...]:
    running = card.running
    now = pulse.cards.get(card.element.seid) if pulse is not None else None
    return (
        card.element.seid,
        card.state.value,
        card.holder.name if card.holder else "-",
        "-" if card.waiting is None else str(card.waiting),
        "-" if now is None else f"{now.per_second:.1f}",
        "-" if now is None else f"{now.busy:.0%}",
        "-" if running is None else str(running.operations),
        "-" if running is None else str(sum(running.errors.values())),
        "-" if running is None else latency(running.waited),
        "-" if running is None else latency(running.worked),
        cause_of(overview, card),
    )


def _urgency(card: CardReport, pulse: Pulse | None) -> tuple[bool, int, int, float]:
    now = pulse.cards.get(card.element.seid, _STILL) if pulse is not None else _STILL
    return (card.state is CardState.IN_SERVICE, -now.errors, -(card.waiting or 0), -now.busy)
