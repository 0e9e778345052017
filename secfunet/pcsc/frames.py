"""What a program and a PC/SC worker say to each other about one card, over one stream socket a card.

A frame is ``length (4, big endian) ‖ kind (1) ‖ body``, where the length counts kind and body. Each request is answered by one frame, in
order: DONE with what was asked for, or BUSY or GONE with a sentence (UTF-8). The worker closes the connection after GONE and BUSY.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from secfunet.errors import SecFuNetError

MAX_BODY: Final = 1 << 17
"""Bytes of a body: an extended APDU has 65544 at most, and a host has no more readers than fit."""

_LENGTH: Final = 4


class FrameError(SecFuNetError):
    """Bytes between a program and its PC/SC worker are not what their format says."""


class Kind(IntEnum):
    """The first byte of a frame."""

    OPEN = 1  # body: the reader's name; answer: ATR
    TRANSMIT = 2  # body: command APDU; answer: response APDU
    RESET_WARM = 3  # answer: ATR
    RESET_COLD = 4  # answer: ATR
    CLOSE = 5  # answered when the card is powered off and free
    LIST = 6  # answer: the readers (encode_readers)
    DONE = 0x80
    BUSY = 0x81
    GONE = 0x82


@dataclass(frozen=True, slots=True)
class Frame:
    """One request or one answer."""

    kind: Kind
    body: bytes = b""

    def encode(self) -> bytes:
        """Raises FrameError if the body is longer than MAX_BODY."""
        if len(self.body) > MAX_BODY:
            raise FrameError(f"a frame cannot carry {len(self.body)} bytes")
        return (1 + len(self.body)).to_bytes(_LENGTH) + bytes((self.kind,)) + self.body

    @property
    def text(self) -> str:
        """The sentence of an answer that is no DONE."""
        return self.body.decode(errors="replace")


class FrameDecoder:
    """Cuts a stream into frames. It holds one unfinished frame at most."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, untrusted: bytes) -> list[Frame]:
        """Takes the next bytes, returns the frames that are complete. Raises FrameError for a length out of bounds, an unknown kind."""
        self._buffer += untrusted
        frames: list[Frame] = []
        position = 0
        while len(self._buffer) - position >= _LENGTH:
            length = int.from_bytes(self._buffer[position : position + _LENGTH])
            if not 1 <= length <= 1 + MAX_BODY:
                raise FrameError("a frame of a length that none has")
            begin, end = position + _LENGTH, position + _LENGTH + length
            if end > len(self._buffer):
                break
            try:
                kind = Kind(self._buffer[begin])
            except ValueError:
                raise FrameError("a frame of an unknown kind") from None
            frames.append(Frame(kind, bytes(self._buffer[begin + 1 : end])))
            position = end
        del self._buffer[:position]
        return frames


@dataclass(frozen=True, slots=True)
class ReaderSeen:
    """A reader as its pcscd shows it: whether a card is in it, whether somebody uses that, and its answer to reset."""

    name: str
    has_card: bool = False
    is_in_use: bool = False
    atr: bytes = b""


def encode_readers(readers: tuple[ReaderSeen, ...]) -> bytes:
    """A JSON list of objects."""
    return json.dumps(
        [{"name": r.name, "card": r.has_card, "used": r.is_in_use, "atr": r.atr.hex()} for r in readers]
    ).encode()


def decode_readers(untrusted: bytes) -> tuple[ReaderSeen, ...]:
    """See encode_readers. Raises FrameError."""
    try:
        values = json.loads(untrusted)
        return tuple(
            ReaderSeen(str(value["name"]), bool(value["card"]), bool(value["used"]), bytes.fromhex(value["atr"]))
            for value in values
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FrameError("this is no list of readers") from None


def choose_reader(wanted: str, names: tuple[str, ...]) -> str | None:
    """The one of ``names`` that ``wanted`` means: of that name, or the only one of that name before its two numbers.

    pcscd numbers readers (interface, slot) in the order in which they were plugged in: "ACS ACR39U 00 00". None: no such, or several.
    """
    if wanted in names:
        return wanted
    numbered = [name for name in names if _without_numbers(name) == wanted]
    return numbered[0] if len(numbered) == 1 else None


def _without_numbers(name: str) -> str:
    numbered = _NUMBERED.fullmatch(name)
    return name if numbered is None else numbered[1]


_NUMBERED: Final = re.compile(r"(.+) [0-9A-Fa-f]{2} [0-9A-Fa-f]{2}", re.DOTALL)
