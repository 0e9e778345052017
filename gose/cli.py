"""``gose``: the commands of a grid's administrator, and the grid itself (``gose serve``).

Exit codes are those of ``secfunet.service.cli``: 1 failed, 65 something named is not known, 69 a card cannot be reached now, 77
refused, 78 the settings or the authority cannot be used.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gose.authority.errors import (
    AuthorityDamagedError,
    AuthorityExistsError,
    AuthorityMissingError,
    CardInUseError,
    IssuanceError,
    TokenNotIssuedError,
)
from gose.commands import audit, authority, binding, enrolment, racs, running, tokens, users
from gose.errors import StartError
from gose.racs.tls import TlsFilesError
from gose.registry import AlreadyEnrolledError, NotEnrolledError
from gose.running import AlreadyRunningError
from secfunet.apdu import ApduError
from secfunet.card.errors import CardBusyError, CardError, CardFormatError, CardGoneError
from secfunet.identity import IdentityError
from secfunet.racs.errors import RacsRefusedError
from secfunet.racs.inventory import ServerUnreachableError
from secfunet.service.audit import AuditBrokenError, AuditUnavailableError
from secfunet.service.cli import VERSION_HELP, ExitCode, application, print_version, run
from secfunet.service.credentials import NoCredentialsError
from secfunet.vm_auth_token import TokenError

app = application("A Grid of Secure Elements: its authority, and the service itself.")
for _module in (authority, enrolment, binding, tokens, running):
    app.add_typer(_module.app)
app.add_typer(audit.app, name="audit")
app.add_typer(racs.app, name="racs")
app.add_typer(users.app, name="user")


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version("gose"), is_eager=True, help=VERSION_HELP)
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """The command ``gose``."""
    run(
        app,
        {
            AuthorityExistsError: ExitCode.REFUSED,
            AuthorityMissingError: ExitCode.CONFIG,
            AuthorityDamagedError: ExitCode.CONFIG,
            IssuanceError: ExitCode.DATA,
            TokenError: ExitCode.DATA,
            IdentityError: ExitCode.DATA,
            NotEnrolledError: ExitCode.DATA,
            AlreadyEnrolledError: ExitCode.REFUSED,
            TokenNotIssuedError: ExitCode.REFUSED,
            CardInUseError: ExitCode.UNAVAILABLE,
            NoCredentialsError: ExitCode.CONFIG,
            CardFormatError: ExitCode.DATA,
            CardGoneError: ExitCode.UNAVAILABLE,
            CardBusyError: ExitCode.UNAVAILABLE,
            CardError: ExitCode.FAILED,
            ApduError: ExitCode.FAILED,
            TlsFilesError: ExitCode.CONFIG,
            AlreadyRunningError: ExitCode.CONFIG,
            StartError: ExitCode.CONFIG,
            AuditUnavailableError: ExitCode.UNAVAILABLE,
            AuditBrokenError: ExitCode.DATA,
            ServerUnreachableError: ExitCode.UNAVAILABLE,
            RacsRefusedError: ExitCode.REFUSED,
        },
    )


if __name__ == "__main__":
    main()
