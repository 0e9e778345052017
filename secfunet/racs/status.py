"""Status lines (draft-urien-core-racs-15, 2.2.3 and 2.4): ``+006 001 9000`` or ``-606 001 the user may not send this command``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from secfunet.racs.errors import RacsProtocolError, RacsValueError
from secfunet.racs.syntax import MAX_LINE

_LINE: Final = re.compile(r"([+-])([0-9])([0-9]{2}) +([0-9]{3})(?: +(.*))?", re.ASCII)


class Event(IntEnum):
    """The first digit (2.4.1). EXECUTION is "no error" after a plus, and "command execution error" after a minus."""

    EXECUTION = 0
    UNKNOWN_COMMAND = 1
    NOT_IMPLEMENTED = 2
    ILLEGAL_COMMAND = 3
    ILLEGAL_VALUE = 4
    SYNTAX = 5
    UNAUTHORISED = 6
    IN_USE = 7
    HARDWARE = 8
    SYSTEM = 9


class Verb(IntEnum):
    """The second and third digit (2.4.2): the command that the line is about. OTHER is none of them."""

    OTHER = 0
    BEGIN = 1
    GET_VERSION = 2
    SET_VERSION = 3
    LIST = 4
    RESET = 5
    APDU = 6
    SHUTDOWN = 7
    POWERON = 8
    ECHO = 9
    SEN = 10
    GET_SEN = 11


@dataclass(frozen=True)
class Status:
    """One status line. ``verb`` is two digits: servers are free in it, and one puts other numbers there than the draft.

    The text may hold an answer of a card: it is no part of ``repr``.
    """

    is_success: bool
    event: Event
    verb: int
    line: int
    text: str = field(default="", repr=False)

    @property
    def code(self) -> int:
        """The three digits."""
        return self.event * 100 + self.verb

    def encode(self) -> str:
        """The line without CRLF. Raises RacsValueError if it does not fit into one."""
        if not 0 <= self.line <= 999 or not 0 <= self.verb <= 99:
            raise RacsValueError("a status line has a line number of three digits, and a verb of two")
        encoded = f"{'+' if self.is_success else '-'}{self.code:03d} {self.line:03d}"
        if self.text:
            encoded += f" {self.text}"
        if len(encoded) > MAX_LINE or not encoded.isascii() or not encoded.isprintable():
            raise RacsValueError("the text of a status line is printable ASCII, and fits into a line")
        return encoded

    @classmethod
    def decode(cls, untrusted: str) -> Status:
        """Raises RacsProtocolError."""
        match = _LINE.fullmatch(untrusted.rstrip(" "))
        if match is None:
            raise RacsProtocolError("that is no status line")
        sign, event, verb, line, text = match.groups()
        if sign == "+" and event != "0":
            raise RacsProtocolError("a status says success and failure at once")
        return cls(sign == "+", Event(int(event)), int(verb), int(line), text or "")


def success(verb: Verb, line: int, text: str = "") -> Status:
    """``+0yz``."""
    return Status(True, Event.EXECUTION, verb, line, text)


def failure(event: Event, verb: Verb, line: int, text: str) -> Status:
    """``-xyz``."""
    return Status(False, event, verb, line, text)
