"""Commands: an error is a sentence on standard error and a documented exit code, never a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum

import typer

from secfunet.errors import SecFuNetError
from secfunet.service.files import UnsafeFileError
from secfunet.service.settings import SettingsError
from secfunet.service.unix_socket import SocketPathError

log = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """What the commands end with (values as in sysexits.h where it has one)."""

    OK = 0
    FAILED = 1  # the operation failed; the message says why
    USAGE = 2  # wrong arguments
    DATA = 65  # the input is not what it should be
    UNAVAILABLE = 69  # a service cannot be reached, or is busy: try again
    INTERNAL = 70  # a fault of ours
    REFUSED = 77  # not permitted
    CONFIG = 78  # the settings cannot be used


def print_version(program: str) -> Callable[[bool], None]:
    """Callback for an eager ``--version`` option."""

    def show(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            typer.echo(f"{program} {version('secfunet')}")
            raise typer.Exit

    return show


def run(app: typer.Typer, exit_codes: Mapping[type[SecFuNetError], ExitCode] | None = None) -> None:
    """Runs a typer application; a SecFuNetError becomes its sentence and its exit code (most specific class first)."""
    table: dict[type[SecFuNetError], ExitCode] = {
        SettingsError: ExitCode.CONFIG,
        UnsafeFileError: ExitCode.CONFIG,
        SocketPathError: ExitCode.CONFIG,
        **(exit_codes or {}),
    }
    try:
        app()
    except SecFuNetError as error:
        code = next((table[kind] for kind in type(error).__mro__ if kind in table), ExitCode.FAILED)
        typer.echo(f"error: {error}", err=True)
        sys.exit(code)
    except OSError as error:
        typer.echo(
            f"error: {error.strerror or error}: {error.filename}" if error.filename else f"error: {error}", err=True
        )
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        # A daemon's log gets the whole of it; a person at a terminal gets a sentence.
        if logging.getLogger().handlers:
            log.exception("a fault in this program")
        else:
            typer.echo(f"error: a fault in this program, please report it: {type(error).__name__}: {error}", err=True)
        sys.exit(ExitCode.INTERNAL)
