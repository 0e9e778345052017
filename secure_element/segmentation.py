"""Long commands in, long answers out: what T=0 and short APDUs make of them (draft-urien-eap-smartcard, 5.2; ISO 7816-4, 5.1.1)."""

from __future__ import annotations

from enum import Enum
from typing import Final

from secfunet.apdu import MAX_DATA, CommandApdu, ResponseApdu
from secfunet.card.instructions import CHAINING, Cla, Ins
from secure_element.errors import CommandRefusedError, Sw

MORE: Final = 0x01
"""P1 bit of Process-EAP: more segments follow."""

LARGEST_ANSWER: Final = 65533
"""A response must fit a frame: 65535 bytes with its status word."""


class AnswerStyle(Enum):
    """How an answer that was not asked for with its exact length is given to a short APDU."""

    DRAFT = "draft"  # as the traces under T=0: 6Cxx, 61xx, and 9F00 with FETCH past 256 bytes
    ISO = "iso"  # as ISO 7816-4 under T=1: up to Le bytes at once, the rest by 61xx


class Segments:
    """The unfinished command and the unfetched answer of one card: at most 64 KB each, both forgotten when another command comes."""

    def __init__(self, style: AnswerStyle) -> None:
        self._style = style
        self.forget()

    def forget(self) -> None:
        """Drops everything (reset, select)."""
        self._header: tuple[int, int, int, int] | None = None
        self._collected = bytearray()
        self._rest = b""
        self._rest_sw1 = 0x61
        self._repeatable: tuple[CommandApdu, bytes] | None = None

    def drop_answer(self) -> None:
        """Another command came: what was not fetched is gone."""
        self._rest = b""

    def join(self, command: CommandApdu) -> CommandApdu | None:
        """The whole command, or None if more segments of it are to come. Raises CommandRefusedError (6700) past 65535 bytes."""
        is_eap = (command.cla & ~CHAINING, command.ins) == (Cla.EAP, Ins.PROCESS_EAP)
        more = bool(command.cla & CHAINING) or (is_eap and bool(command.p1 & MORE))
        p1 = command.p1 & ~MORE if is_eap else command.p1
        header = (command.cla & ~CHAINING, command.ins, p1, command.p2)
        if header != self._header:
            self._header, self._collected = header, bytearray()
        self._collected += command.data
        if len(self._collected) > MAX_DATA:
            self._header = None
            raise CommandRefusedError(Sw.WRONG_LENGTH)
        if more:
            return None
        data, self._header, self._collected = bytes(self._collected), None, bytearray()
        return CommandApdu(*header, data, command.le)

    def repeat(self, command: CommandApdu) -> ResponseApdu | None:
        """The answer to a command that comes again after 6Cxx, this time with the right Le: given, not executed anew."""
        remembered, self._repeatable = self._repeatable, None
        if remembered is None or command.le != len(remembered[1]):
            return None
        before = remembered[0]
        same = (command.cla, command.ins, command.p1, command.p2, command.data) == (
            before.cla,
            before.ins,
            before.p1,
            before.p2,
            before.data,
        )
        return ResponseApdu(remembered[1]) if same else None

    def answer(self, command: CommandApdu, data: bytes) -> ResponseApdu:
        """The first response to a command whose whole answer is ``data``."""
        self._rest = b""
        if not data:
            return ResponseApdu()
        draft = self._style is AnswerStyle.DRAFT
        self._rest_sw1 = 0x9F if draft and len(data) > 256 else 0x61
        if command.le is None:
            return self._give(data, 0)
        if len(data) == command.le or (len(data) < command.le and (command.le > 256 or command.data or not draft)):
            return self._give(data, len(data))
        if command.le > 256 or not draft:
            return self._give(data, command.le)
        if command.data or len(data) > 256:
            return self._give(data, 0)
        self._repeatable = command, data
        return ResponseApdu(sw=Sw.WRONG_LE | len(data) & 0xFF)

    def fetch(self, command: CommandApdu) -> ResponseApdu:
        """The next piece of the answer (Get-Response, FETCH). Raises CommandRefusedError (6985) if nothing is left."""
        if not self._rest:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        le = command.le or 256
        if le > len(self._rest) and self._style is AnswerStyle.DRAFT and le <= 256:
            return ResponseApdu(sw=Sw.WRONG_LE | len(self._rest) & 0xFF)
        return self._give(self._rest, le)

    def _give(self, data: bytes, size: int) -> ResponseApdu:
        size = min(size, LARGEST_ANSWER)
        piece, self._rest = data[:size], data[size:]
        if not self._rest:
            return ResponseApdu(piece)
        return ResponseApdu(piece, self._rest_sw1 << 8 | (0 if len(self._rest) >= 256 else len(self._rest)))
