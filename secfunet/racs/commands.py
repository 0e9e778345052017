"""The commands of a request (draft-urien-core-racs-15, 2.3), as values: text in, value or StatusError out, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from secfunet.racs.errors import RacsError, RacsValueError
from secfunet.racs.status import Event, Status, Verb, failure
from secfunet.racs.syntax import MAX_APDU, check_seid, check_token, parse_hex, tokens_of

APPEND: Final = "APPEND"
GET_RESPONSE: Final = bytes.fromhex("00C00000")
"""The default of FETCH (2.3.8)."""

_APDU_SIZES: Final = range(4, MAX_APDU + 1)
_AID_SIZES: Final = range(1, 17)


class CommandError(RacsError):
    """A command that is not done; ``event`` says why to the client."""

    def __init__(self, event: Event, text: str, verb: Verb = Verb.OTHER) -> None:
        super().__init__(text)
        self.event = event
        self.verb = verb
        self.text = text

    def status(self, line: int) -> Status:
        """The status line that says so."""
        return failure(self.event, self.verb, line, self.text)


@dataclass(frozen=True)
class GetVersion:
    """Which version of RACS is spoken."""

    verb: ClassVar[Verb] = Verb.GET_VERSION


@dataclass(frozen=True)
class SetVersion:
    """Speak this version."""

    verb: ClassVar[Verb] = Verb.SET_VERSION
    version: str


@dataclass(frozen=True)
class ListCards:
    """Which secure elements are there."""

    verb: ClassVar[Verb] = Verb.LIST


@dataclass(frozen=True)
class PowerOn:
    """Power a secure element up; it is this session's then."""

    verb: ClassVar[Verb] = Verb.POWERON
    seid: str


@dataclass(frozen=True)
class Reset:
    """Reset a secure element, cold or warm."""

    verb: ClassVar[Verb] = Verb.RESET
    seid: str
    warm: bool = False


@dataclass(frozen=True)
class Shutdown:
    """Power a secure element down; it is nobody's then."""

    verb: ClassVar[Verb] = Verb.SHUTDOWN
    seid: str


@dataclass(frozen=True)
class Apdu:
    """Send a command APDU. ``continue_sw``: go on only with that status word; ``more``: fetch with ``fetch`` ‖ SW2 while SW1 is this.

    The APDU may hold a PIN: it is no part of ``repr``.
    """

    verb: ClassVar[Verb] = Verb.APDU
    seid: str
    apdu: bytes = field(repr=False)
    continue_sw: int | None = None
    more: int | None = None
    fetch: bytes = GET_RESPONSE


@dataclass(frozen=True)
class Echo:
    """Say this word."""

    verb: ClassVar[Verb] = Verb.ECHO
    token: str


@dataclass(frozen=True)
class Sen:
    """Tell, or set, a secure element's name and the AID of its TLS-SE application."""

    verb: ClassVar[Verb] = Verb.SEN
    seid: str
    name: str | None = None
    aid: bytes | None = None


@dataclass(frozen=True)
class GetSen:
    """Tell a secure element's name."""

    verb: ClassVar[Verb] = Verb.GET_SEN
    seid: str


Command = GetVersion | SetVersion | ListCards | PowerOn | Reset | Shutdown | Apdu | Echo | Sen | GetSen


@dataclass(frozen=True)
class Step:
    """A command at its place: ``line`` counts from BEGIN, which is 0; ``append``: its status line is wanted, whatever follows."""

    line: int
    command: Command
    append: bool = False


def parse_command(line: int, untrusted: str) -> Step:
    """One command line. Raises CommandError with the event that the draft has for it: 1 (no such command), 4 or 5 (its parameters)."""
    words = tokens_of(untrusted)
    if not words:
        raise CommandError(Event.SYNTAX, "a line without a command")
    name, *parameters = words
    known = _PARSERS.get(name)
    if known is None:
        raise CommandError(Event.UNKNOWN_COMMAND, f"Unknown command at line {line}")
    verb, counts, parse = known
    append = bool(parameters) and parameters[-1] == APPEND
    if append:
        parameters.pop()
    if len(parameters) not in counts:
        wanted = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        raise CommandError(Event.SYNTAX, f"{name} has {wanted} parameters", verb)
    try:
        return Step(line, parse(parameters), append)
    except RacsValueError as error:
        raise CommandError(Event.SYNTAX, f"{name}: {error}", verb) from None
    except CommandError as error:
        error.verb = verb
        raise


def encode_command(command: Command, *, append: bool = False) -> str:
    """The line without CRLF. Raises RacsValueError for a value that has no place in one."""
    words = [_NAMES[command.verb], *_parameters_of(command)]
    if append or words[-1] == APPEND:
        # A last parameter that reads APPEND would be taken for the keyword; with the keyword behind it, it is not.
        words.append(APPEND)
    return " ".join(words)


def _parameters_of(command: Command) -> list[str]:
    match command:
        case GetVersion() | ListCards():
            return []
        case SetVersion(version):
            return [check_token(version)]
        case Echo(token):
            return [check_token(token)]
        case Reset(seid, warm):
            return [check_seid(seid), "WARM"] if warm else [check_seid(seid)]
        case Apdu():
            return _parameters_of_apdu(command)
        case Sen(seid, name, aid):
            if name is None and aid is not None:
                raise RacsValueError("an AID comes behind a name")
            return [check_seid(seid)] + ([] if name is None else [check_token(name)]) + ([] if not aid else [_hex(aid)])
        case PowerOn(seid) | Shutdown(seid) | GetSen(seid):
            return [check_seid(seid)]


def _parameters_of_apdu(command: Apdu) -> list[str]:
    if len(command.apdu) not in _APDU_SIZES or len(command.fetch) != len(GET_RESPONSE):
        raise RacsValueError("an APDU has 4 to 65544 bytes, and a FETCH 4")
    words = [check_seid(command.seid), _hex(command.apdu)]
    if command.continue_sw is not None:
        words.append(f"CONTINUE={command.continue_sw:04X}")
    if command.more is not None:
        words.append(f"MORE={command.more:02X}")
    if command.fetch != GET_RESPONSE:
        words.append(f"FETCH={_hex(command.fetch)}")
    return words


def _hex(value: bytes) -> str:
    return value.hex().upper()


def _parse_reset(parameters: Sequence[str]) -> Reset:
    seid, *rest = parameters
    if rest and rest != ["WARM"]:
        raise CommandError(Event.ILLEGAL_VALUE, "the second parameter of RESET is WARM")
    return Reset(check_seid(seid), bool(rest))


def _parse_apdu(parameters: Sequence[str]) -> Apdu:
    seid, apdu, *options = parameters
    values: dict[str, bytes] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OPTIONS or name in values:
            raise RacsValueError("CONTINUE=, MORE= and FETCH= may follow, each once")
        values[name] = parse_hex(value, _OPTIONS[name])
    return Apdu(
        check_seid(seid),
        parse_hex(apdu, _APDU_SIZES),
        int.from_bytes(values["CONTINUE"]) if "CONTINUE" in values else None,
        values["MORE"][0] if "MORE" in values else None,
        values.get("FETCH", GET_RESPONSE),
    )


_OPTIONS: Final = {"CONTINUE": range(2, 3), "MORE": range(1, 2), "FETCH": range(4, 5)}


def _parse_sen(parameters: Sequence[str]) -> Sen:
    return Sen(
        check_seid(parameters[0]),
        check_token(parameters[1]) if len(parameters) > 1 else None,
        parse_hex(parameters[2], _AID_SIZES) if len(parameters) > 2 else None,
    )


_PARSERS: Final[dict[str, tuple[Verb, range, Callable[[Sequence[str]], Command]]]] = {
    "GET-VERSION": (Verb.GET_VERSION, range(1), lambda _: GetVersion()),
    "SET-VERSION": (Verb.SET_VERSION, range(1, 2), lambda words: SetVersion(check_token(words[0]))),
    "LIST": (Verb.LIST, range(1), lambda _: ListCards()),
    "RESET": (Verb.RESET, range(1, 3), _parse_reset),
    "APDU": (Verb.APDU, range(2, 6), _parse_apdu),
    "SHUTDOWN": (Verb.SHUTDOWN, range(1, 2), lambda words: Shutdown(check_seid(words[0]))),
    "POWERON": (Verb.POWERON, range(1, 2), lambda words: PowerOn(check_seid(words[0]))),
    "ECHO": (Verb.ECHO, range(1, 2), lambda words: Echo(check_token(words[0]))),
    "SEN": (Verb.SEN, range(1, 4), _parse_sen),
    "GET-SEN": (Verb.GET_SEN, range(1, 2), lambda words: GetSen(check_seid(words[0]))),
}
_NAMES: Final = {verb: name for name, (verb, _, _) in _PARSERS.items()}
