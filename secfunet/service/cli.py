"""Commands: an error is a sentence on standard error and a documented exit code, never a traceback."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, get_type_hints

import typer
import typer.main
import typer.models

from secfunet.errors import SecFuNetError
from secfunet.service.files import UnsafeFileError
from secfunet.service.results import StreamClosedError
from secfunet.service.settings import SettingsError
from secfunet.service.unix_socket import SocketPathError

log = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """What every command ends with (values as in sysexits.h where it has one); docs/operations.md has the causes of each."""

    OK = 0
    FAILED = 1  # the operation failed; the message says why
    USAGE = 2  # wrong arguments
    DATA = 65  # something named is not known, or what was given is not what it should be
    UNAVAILABLE = 69  # a service or a card cannot be reached, or is busy: try again
    INTERNAL = 70  # a fault of this program
    REFUSED = 77  # not permitted, or it would destroy what is there
    CONFIG = 78  # the settings cannot be used, or another process runs on the same state or address


def application(help_text: str) -> typer.Typer:
    """A program, or a group of its commands: the same habits for all."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def print_version(program: str) -> Callable[[bool], None]:
    """Callback for an eager ``--version`` option."""

    def show(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            typer.echo(f"{program} {version('secfunet')}")
            raise typer.Exit

    return show


VERSION_HELP: Final = "Print the version."
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]


def tell(text: str, facts: Mapping[str, object] | Sequence[Mapping[str, object]], *, as_json: bool) -> None:
    """A command's result: ``facts`` as JSON, or ``text`` for a person."""
    typer.echo(json.dumps(facts, indent=2) if as_json else text)


def run(app: typer.Typer, exit_codes: Mapping[type[SecFuNetError], ExitCode] | None = None) -> None:
    """Runs a typer application; a SecFuNetError becomes its sentence and its exit code (most specific class first).

    With ``--json`` among the arguments the error is a JSON object, on standard error as well.
    """
    table: dict[type[SecFuNetError], ExitCode] = {
        SettingsError: ExitCode.CONFIG,
        UnsafeFileError: ExitCode.CONFIG,
        SocketPathError: ExitCode.CONFIG,
        StreamClosedError: ExitCode.USAGE,
        **(exit_codes or {}),
    }
    _open_standard_descriptors()
    _leave_files_alone(app)
    command = typer.main.get_command(app)
    _tidy(command)
    try:
        command()
    except SecFuNetError as error:
        code = next((table[kind] for kind in type(error).__mro__ if kind in table), ExitCode.FAILED)
        if isinstance(error.__cause__, PermissionError):
            code = ExitCode.REFUSED
        _end(f"{error}{_hint(error)}", code, error)
    except BrokenPipeError:
        # The reader of a pipe had enough. What Python would still write at its end has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(ExitCode.FAILED)
    except OSError as error:
        _end(said_by(error), _code_of(error))
    except Exception as error:
        # A daemon's log gets the whole of it; a person at a terminal gets a sentence.
        if logging.getLogger().handlers:
            log.exception("a fault in this program")
            sys.exit(ExitCode.INTERNAL)
        _end(f"a fault in this program, please report it: {type(error).__name__}: {error}", ExitCode.INTERNAL)


def _tidy(command: Any) -> None:
    """Help as users know it: arguments in capitals, flags without a value."""
    for parameter in getattr(command, "params", ()):
        if parameter.param_type_name == "argument":
            parameter.metavar = parameter.metavar or str(parameter.name).upper()
        elif getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    if hasattr(command, "get_help_option"):
        help_option = command.get_help_option
        command.get_help_option = lambda context: _without_value(help_option(context))
    for inner in getattr(command, "commands", {}).values():
        _tidy(inner)


def _leave_files_alone(app: typer.Typer) -> None:
    """What cannot be read, or is not there, is said where it is read: in the same words, with the same code, for every command."""
    for command in app.registered_commands:
        if command.callback is None:
            continue
        for hint in get_type_hints(command.callback, include_extras=True).values():
            for metadata in getattr(hint, "__metadata__", ()):
                if isinstance(metadata, typer.models.ParameterInfo):
                    metadata.readable = metadata.exists = False
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _leave_files_alone(group.typer_instance)


def _without_value(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


def said_by(error: OSError) -> str:
    """What the system refused, and at which file, without the number of the error."""
    said = (error.strerror or str(error) or type(error).__name__).strip()
    return f"{os.fsdecode(error.filename)}: {said}" if isinstance(error.filename, str | bytes) else said


def _hint(error: SecFuNetError) -> str:
    """How to name other settings, for who has none where they are looked for."""
    if not isinstance(error, SettingsError) or not isinstance(error.__cause__, FileNotFoundError):
        return ""
    program = Path(sys.argv[0]).name.removesuffix(".py").upper().replace("-", "_")
    variable = f"{program}_RACS_CONFIG" if error.path.name == "racs.toml" else f"{program}_CONFIG"
    return f"; name the settings with --config, or in {variable}"


def _code_of(error: OSError) -> ExitCode:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return ExitCode.REFUSED
        case errno.EADDRINUSE | errno.EADDRNOTAVAIL:
            return ExitCode.CONFIG
    return ExitCode.FAILED


def _end(message: str, code: ExitCode, error: Exception | None = None) -> NoReturn:
    if "--json" in sys.argv[1:]:
        facts: dict[str, object] = {"message": message, "exit_code": int(code)}
        facts |= {name: str(value) for name in ("reason", "correlation") if (value := getattr(error, name, None))}
        typer.echo(json.dumps({"error": facts}), err=True)
    else:
        typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def _open_standard_descriptors() -> None:
    """A standard stream that the caller closed leads nowhere: else the next file that is opened would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
