"""The framing of a virtual smartcard (vpcd): two bytes of length, big endian, and a body.

A body of one byte is a control; any other is an APDU. Only ``GET_ATR`` among the controls is answered.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from secfunet.card.errors import CardFormatError

MAX_BODY: Final = 0xFFFF


class Control(IntEnum):
    """Bodies of one byte, reader to card."""

    POWER_OFF = 0
    POWER_ON = 1
    RESET = 2
    GET_ATR = 4


def encode_frame(body: bytes) -> bytes:
    """Raises CardFormatError if ``body`` is empty or longer than 65535 bytes."""
    if not 0 < len(body) <= MAX_BODY:
        raise CardFormatError(f"a frame cannot carry {len(body)} bytes")
    return len(body).to_bytes(2) + body


def encode_control(control: Control) -> bytes:
    """One control byte in its frame."""
    return encode_frame(bytes((control,)))


class FrameDecoder:
    """Cuts a stream of bytes into bodies. It holds one unfinished frame at most: 65536 bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, untrusted: bytes) -> list[bytes]:
        """Takes the next bytes of the stream, returns the bodies that are complete. Raises CardFormatError for an empty frame."""
        self._buffer += untrusted
        bodies: list[bytes] = []
        position = 0
        while len(self._buffer) - position >= 2:
            end = position + 2 + int.from_bytes(self._buffer[position : position + 2])
            if end == position + 2:
                raise CardFormatError("an empty frame")
            if end > len(self._buffer):
                break
            bodies.append(bytes(self._buffer[position + 2 : end]))
            position = end
        del self._buffer[:position]
        return bodies
