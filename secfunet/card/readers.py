"""``gose readers`` and ``secure-middleware readers``: which PC/SC readers are there, and how the cards in them are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from secfunet.apdu import ApduError
from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError, CardError
from secfunet.card.parameters import Segmentation
from secfunet.card.pcsc import connect_pcsc, list_readers
from secfunet.card.place import PcscPlace
from secfunet.pcsc.frames import ReaderSeen
from secfunet.service.cli import JsonOption
from secfunet.service.tables import columns

TIMEOUT: Final = 5.0
"""Seconds that a pcscd has for its list, and a card for its answers."""


@dataclass(frozen=True)
class ReaderReport:
    """A reader, and what is in it: "empty", "in use", "answers" (with the attempts that its PIN has left), or why it does not."""

    place: PcscPlace
    state: str
    atr: bytes = b""
    pin_attempts: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "place": str(self.place),
            "reader": self.place.reader,
            "pcscd": None if self.place.daemon is None else str(self.place.daemon),
            "state": self.state,
            "atr": self.atr.hex().upper(),
            "pin_attempts": self.pin_attempts,
        }


async def read_readers(daemons: Sequence[Path | None]) -> list[ReaderReport]:
    """Asks every pcscd, and every card that nobody uses; it costs no attempt at a PIN. Raises CardError if a pcscd does not answer."""
    reports: list[ReaderReport] = []
    for daemon in daemons:
        seen = await list_readers(daemon, timeout=TIMEOUT)
        reports += await asyncio.gather(*(_report(reader, PcscPlace(reader.name, daemon)) for reader in seen))
    return reports


async def _report(seen: ReaderSeen, place: PcscPlace) -> ReaderReport:
    if not seen.has_card:
        return ReaderReport(place, "empty")
    if seen.is_in_use:
        return ReaderReport(place, "in use", seen.atr)
    try:
        port = await connect_pcsc(place.reader, place.daemon, timeout=TIMEOUT, answer_timeout=TIMEOUT)
        card = CardClient(port, segmentation=Segmentation.DRAFT)  # which every card takes
        try:
            await card.select()
            return ReaderReport(place, "answers", seen.atr, await card.pin_attempts())
        finally:
            await card.close()
    except CardBusyError:
        return ReaderReport(place, "in use", seen.atr)
    except ApduError as error:
        return ReaderReport(place, f"no EAP-TLS applet: {error}", seen.atr)
    except CardError as error:
        return ReaderReport(place, str(error), seen.atr)


def as_table(reports: Sequence[ReaderReport]) -> str:
    """For people: names that ``--card`` takes, and that stand in settings as ``pcsc`` without their first word."""
    if not reports:
        return "no readers"
    rows = [("CARD", "STATE", "PIN ATTEMPTS", "ATR")]
    for report in reports:
        attempts = "-" if report.pin_attempts is None else str(report.pin_attempts)
        rows.append((str(report.place), report.state, attempts, report.atr.hex().upper() or "-"))
    return columns(rows[0], rows[1:])


def show_readers(
    pcscd: Annotated[
        list[Path] | None,
        typer.Option(help="Socket of a pcscd; may be given several times. [default: the system's]", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show this host's PC/SC readers as 'pcsc:' names, the cards in them, and the attempts that the PIN of a free card has left."""
    reports = asyncio.run(read_readers([path.absolute() for path in pcscd or []] or [None]))
    typer.echo(json.dumps([report.as_json() for report in reports]) if as_json else as_table(reports))
