"""The client's end of a connection, sans-IO: one request at a time, then its answer.

What the one public server does otherwise than the draft is accepted: ``BEGIN`` with a space and no identifier, an error before END was
sent, other second and third digits, other texts. What could be mistaken for the answer to something else is not: an answer that nobody
asked for, another identifier, a line number that the request does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from secfunet.racs.commands import Command, encode_command
from secfunet.racs.errors import RacsProtocolError, RacsRefusedError, RacsValueError
from secfunet.racs.status import Event, Status
from secfunet.racs.syntax import MAX_ANSWER, MAX_COMMANDS, MAX_REQUEST, LineReader, check_token, parse_hex, tokens_of


@dataclass(frozen=True)
class Response:
    """The status lines of an answer: at most one is a failure, and that is the last."""

    identifier: str | None
    statuses: tuple[Status, ...]

    @property
    def failed(self) -> Status | None:
        """The failure, or None."""
        return None if self.statuses[-1].is_success else self.statuses[-1]

    def at(self, line: int) -> Status | None:
        """The status of that line, or None."""
        return next((status for status in self.statuses if status.line == line), None)

    def raise_failure(self) -> None:
        """Raises RacsRefusedError if the request failed."""
        if self.failed is not None:
            raise RacsRefusedError(self.failed.code, self.failed.text)


class _State(Enum):
    IDLE = "idle"
    AWAITING = "awaiting an answer"
    IN_ANSWER = "in an answer"
    CLOSED = "closed"


class ClientConnection:
    """``send`` gives the bytes of a request, ``receive`` takes bytes (none: the server has ended the stream)."""

    def __init__(self) -> None:
        self._lines = LineReader()
        self._state = _State.IDLE
        self._expected: str | None = None
        self._identifier: str | None = None
        self._last_line = 0
        self._statuses: list[Status] = []
        self._size = 0

    @property
    def is_closed(self) -> bool:
        """Nothing can be sent any more."""
        return self._state is _State.CLOSED

    def send(self, commands: Sequence[Command], *, identifier: str | None = None, append: bool = False) -> bytes:
        """A request; ``append``: the status of every command is wanted. Raises RacsValueError for one that RACS cannot carry."""
        if self._state is not _State.IDLE:
            raise RacsValueError("the answer to the last request is not here yet, or the connection is closed")
        if len(commands) > MAX_COMMANDS:
            raise RacsValueError(f"a request has at most {MAX_COMMANDS} commands")
        begin = "BEGIN" if identifier is None else f"BEGIN {check_token(identifier)}"
        lines = [begin, *(encode_command(command, append=append) for command in commands), "END"]
        encoded = "".join(f"{line}\r\n" for line in lines).encode("ascii")
        if len(encoded) > MAX_REQUEST:
            raise RacsValueError(f"a request has at most {MAX_REQUEST} characters")
        self._expected, self._last_line = identifier, len(commands)
        self._state = _State.AWAITING
        return encoded

    def receive(self, untrusted: bytes) -> Response | None:
        """The answer, once it is all there. Raises RacsProtocolError, then and ever after."""
        if self._state is _State.CLOSED:
            raise RacsProtocolError("the connection is closed")
        try:
            return self._receive(untrusted)
        except RacsProtocolError:
            self._state = _State.CLOSED
            raise

    def _receive(self, untrusted: bytes) -> Response | None:
        if not untrusted:
            raise RacsProtocolError("the server has closed the connection")
        self._lines.feed(untrusted)
        response = None
        while (line := self._lines.take()) is not None:
            if response is not None:
                raise RacsProtocolError("an answer comes that nobody asked for")
            response = self._take(line)
        if response is not None and len(self._lines):
            raise RacsProtocolError("an answer comes that nobody asked for")
        return response

    def _take(self, line: str) -> Response | None:
        words = tokens_of(line)
        self._size += len(line)
        if self._size > MAX_ANSWER:
            raise RacsProtocolError(f"an answer has more than {MAX_ANSWER} characters")
        if self._state is _State.AWAITING and words[:1] == ["BEGIN"] and len(words) <= 2:
            self._state = _State.IN_ANSWER
            self._identifier = words[1] if len(words) == 2 else None
            self._statuses = []
            self._size = 0
            return None
        if self._state is not _State.IN_ANSWER:
            raise RacsProtocolError("that is no answer to a request")
        if words == ["END"]:
            return self._end()
        status = Status.decode(line)
        last = self._statuses[-1] if self._statuses else None
        if status.line > self._last_line + 1 or (last is not None and status.line <= last.line):
            raise RacsProtocolError("a status is about a line that the request does not have")
        if last is not None and not last.is_success:
            raise RacsProtocolError("the server went on behind an error")
        self._statuses.append(status)
        return None

    def _end(self) -> Response:
        if not self._statuses:
            raise RacsProtocolError("an answer has no status line")
        response = Response(self._identifier, tuple(self._statuses))
        # What is refused before BEGIN was understood has no identifier.
        if self._identifier != self._expected and (self._identifier is not None or response.failed is None):
            raise RacsProtocolError("an answer is to another request")
        self._state = _State.IDLE
        return response


def response_apdu(status: Status) -> bytes:
    """The card's response in the status of an APDU command. Raises RacsRefusedError, RacsProtocolError."""
    if not status.is_success:
        raise RacsRefusedError(status.code, status.text)
    try:
        return parse_hex(status.text, range(2, 65539))
    except RacsValueError:
        raise RacsProtocolError("the status of an APDU holds no response") from None


def is_in_use(error: RacsRefusedError) -> bool:
    """Another session has the secure element (draft, 2.4.1: -7yz)."""
    return error.code // 100 == Event.IN_USE


def is_unauthorised(error: RacsRefusedError) -> bool:
    """The server's policy is against it (draft, 2.4.1: -6yz)."""
    return error.code // 100 == Event.UNAUTHORISED
