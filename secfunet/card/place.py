"""Where a card of this host is: behind a Unix socket, or in a reader of pcscd; and the one way to either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from secfunet.card.errors import CardFormatError
from secfunet.card.exchange import ANSWER_TIMEOUT
from secfunet.card.parameters import Segmentation
from secfunet.card.pcsc import connect_pcsc
from secfunet.card.ports import CardPort
from secfunet.card.unix import connect_unix

MAX_READER_NAME: Final = 127
"""Bytes (pcsc-lite: MAX_READERNAME, with its end)."""

_SCHEME: Final = "pcsc:"
_DAEMON: Final = "@/"


@dataclass(frozen=True, slots=True)
class PcscPlace:
    """A reader by its name, of the pcscd that listens at ``daemon`` (None: the system's). Raises CardFormatError for a name that none has.

    ``segmentation``: how long the APDUs are that the card there takes.
    """

    reader: str
    daemon: Path | None = None
    segmentation: Segmentation = Segmentation.EXTENDED

    def __post_init__(self) -> None:
        if not 0 < len(self.reader.encode(errors="replace")) <= MAX_READER_NAME or not self.reader.isprintable():
            raise CardFormatError(f"the name of a reader has 1 to {MAX_READER_NAME} printable characters")
        if self.daemon is not None and not self.daemon.is_absolute():
            raise CardFormatError("the socket of a pcscd is named by an absolute path")

    def __str__(self) -> str:
        return f"{_SCHEME}{self.reader}" + ("" if self.daemon is None else f"@{self.daemon}")


CardPlace = Path | PcscPlace
"""A Unix socket's path, or a reader."""


def parse_place(text: str) -> CardPlace:
    """``pcsc:READER``, ``pcsc:READER@/path/of/pcscd.comm``, or the path of a Unix socket. Raises CardFormatError."""
    if "\0" in text or not text:
        raise CardFormatError("a card is named by 'pcsc:' and its reader's name, or by the path of its Unix socket")
    if not text.startswith(_SCHEME):
        return Path(text)
    reader, separator, daemon = text.removeprefix(_SCHEME).partition(_DAEMON)
    return PcscPlace(reader, Path("/" + daemon) if separator else None)


def segmentation_at(place: CardPlace) -> Segmentation:
    """How long the APDUs are that a card there takes."""
    return place.segmentation if isinstance(place, PcscPlace) else Segmentation.EXTENDED


async def connect_card(place: CardPlace, *, timeout: float, answer_timeout: float = ANSWER_TIMEOUT) -> CardPort:
    """The card, powered on, within ``timeout`` seconds. Raises CardGoneError, CardBusyError."""
    if isinstance(place, PcscPlace):
        return await connect_pcsc(place.reader, place.daemon, timeout=timeout, answer_timeout=answer_timeout)
    return await connect_unix(place, timeout=timeout, answer_timeout=answer_timeout)
