"""The server's end of a connection, sans-IO: lines in, requests out; and what an answer to one looks like.

A connection is between requests, or inside one; a line moves it by the table below, and any other line closes it, because nobody could say
where the next request begins. A command line that is malformed closes nothing: the request ends there, and its status says so (draft, 2.1:
processing stops at the first error).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from secfunet.racs.commands import CommandError, Step, parse_command
from secfunet.racs.errors import RacsProtocolError, RacsValueError
from secfunet.racs.status import Event, Status, Verb, failure, success
from secfunet.racs.syntax import MAX_ANSWER, MAX_COMMANDS, MAX_REQUEST, LineReader, check_token, tokens_of


@dataclass(frozen=True)
class Request:
    """A whole request. ``steps`` are its commands up to the first malformed one; ``problem`` is that one's status line."""

    identifier: str | None
    steps: tuple[Step, ...]
    problem: Status | None = None


class _State(Enum):
    IDLE = "between requests"
    IN_REQUEST = "in a request"
    CLOSED = "closed"


class _Line(Enum):
    BEGIN = "BEGIN"
    COMMAND = "a command"
    END = "END"
    EOF = "the end of the stream"


_TRANSITIONS: Final = {
    (_State.IDLE, _Line.BEGIN): _State.IN_REQUEST,
    (_State.IDLE, _Line.EOF): _State.CLOSED,
    (_State.IN_REQUEST, _Line.COMMAND): _State.IN_REQUEST,
    (_State.IN_REQUEST, _Line.END): _State.IDLE,
}


class ServerConnection:
    """``receive`` takes bytes (none: the client has ended the stream), ``next_request`` gives requests in their order."""

    def __init__(self) -> None:
        self._lines = LineReader()
        self._state = _State.IDLE
        self._identifier: str | None = None
        self._steps: list[Step] = []
        self._problem: Status | None = None
        self._line = 0
        self._size = 0
        self._has_ended = False

    @property
    def is_closed(self) -> bool:
        """The client has ended the stream between two requests."""
        return self._state is _State.CLOSED

    @property
    def is_idle(self) -> bool:
        """No request has begun that is not complete."""
        return self._state is not _State.IN_REQUEST and not len(self._lines)

    def receive(self, untrusted: bytes) -> None:
        """More of the stream; feed it no more before ``next_request`` gives None."""
        if untrusted:
            self._lines.feed(untrusted)
        else:
            self._has_ended = True

    def next_request(self) -> Request | None:
        """The next request; None: more is needed, or the stream is over. Raises RacsProtocolError; then it is over."""
        while self._state is not _State.CLOSED:
            try:
                line = self._lines.take()
            except RacsProtocolError as error:
                raise self._fatal(Event.SYNTAX, str(error)) from None
            if line is None:
                if not self._has_ended:
                    return None
                if len(self._lines):
                    raise self._fatal(Event.SYNTAX, "the stream ends inside a line")
                self._move(_Line.EOF)
                return None
            request = self._take(line)
            if request is not None:
                return request
        return None

    def _take(self, line: str) -> Request | None:
        words = tokens_of(line)
        kind = {"BEGIN": _Line.BEGIN, "END": _Line.END}.get(words[0] if words else "", _Line.COMMAND)
        if kind is not _Line.BEGIN:
            self._line += 1
        self._move(kind)
        self._size = len(line) if kind is _Line.BEGIN else self._size + len(line)
        if self._size > MAX_REQUEST or self._line > MAX_COMMANDS + 1:
            raise self._fatal(
                Event.SYSTEM, f"a request has at most {MAX_COMMANDS} commands and {MAX_REQUEST} characters"
            )
        if kind is _Line.BEGIN:
            self._begin(words[1:])
        elif kind is _Line.COMMAND and self._problem is None:
            try:
                self._steps.append(parse_command(self._line, line))
            except CommandError as error:
                self._problem = error.status(self._line)
        elif kind is _Line.END:
            if len(words) > 1 and self._problem is None:
                self._problem = failure(Event.SYNTAX, Verb.OTHER, self._line, "END has no parameters")
            return Request(self._identifier, tuple(self._steps), self._problem)
        return None

    def _begin(self, parameters: list[str]) -> None:
        self._line, self._steps, self._identifier, self._problem = 0, [], None, None
        try:
            if len(parameters) > 1:
                raise RacsValueError("BEGIN has one parameter at most")
            self._identifier = check_token(parameters[0]) if parameters else None
        except RacsValueError as error:
            self._problem = failure(Event.SYNTAX, Verb.BEGIN, 0, str(error))

    def _move(self, kind: _Line) -> None:
        state = _TRANSITIONS.get((self._state, kind))
        if state is None:
            verb = Verb.BEGIN if kind is _Line.BEGIN else Verb.OTHER
            raise self._fatal(Event.ILLEGAL_COMMAND, f"{kind.value} comes {self._state.value}", verb)
        self._state = state

    def _fatal(self, event: Event, text: str, verb: Verb = Verb.OTHER) -> RacsProtocolError:
        line = self._line + (verb is Verb.BEGIN) if self._state is _State.IN_REQUEST else 0
        identifier = self._identifier if self._state is _State.IN_REQUEST else None
        self._state = _State.CLOSED
        status = failure(event, verb, min(line, 999), text)
        return RacsProtocolError(text, encode_answer(identifier, [status]))


class Answer:
    """Gathers the status lines of one request: those that APPEND asks for, and the last one (draft, 2.3.3)."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._statuses: list[Status] = []
        self._last: Status | None = None
        self._size = 0

    def add(self, step: Step, status: Status) -> bool:
        """The outcome of the next command. Returns whether the following one is to be done."""
        if self._size + len(status.text) > MAX_ANSWER - 1024:
            status = failure(Event.SYSTEM, step.command.verb, step.line, "the answer is too long")
        self._last = status
        if step.append or not status.is_success:
            self._statuses.append(status)
            self._size += len(status.text) + 16
        return status.is_success

    def encode(self) -> bytes:
        """The whole answer."""
        has_failed = self._last is not None and not self._last.is_success
        if self._request.problem is not None and not has_failed:
            self._statuses.append(self._request.problem)
        elif self._last is None:
            self._statuses.append(success(Verb.BEGIN, 0, "Success"))
        elif self._last not in self._statuses:
            self._statuses.append(self._last)
        return encode_answer(self._request.identifier, self._statuses)


def encode_answer(identifier: str | None, statuses: list[Status]) -> bytes:
    """BEGIN, the lines, END."""
    lines = ["BEGIN" if identifier is None else f"BEGIN {identifier}", *(status.encode() for status in statuses), "END"]
    return "".join(f"{line}\r\n" for line in lines).encode("ascii")
