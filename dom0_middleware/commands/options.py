"""Options that several commands have, and what is wrong with what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secfunet.errors import SecFuNetError
from secfunet.service.cli import JsonOption

DEFAULT_CONFIG = Path("/etc/secfunet/secure-middleware.toml")
FIRST_ORCHESTRATOR = "admin"

Config = Annotated[
    Path, typer.Option("--config", envvar="SECURE_MIDDLEWARE_CONFIG", help="Settings (TOML).", dir_okay=False)
]
As = Annotated[str, typer.Option("--as", help="The orchestrator whose certificate to use.")]
AsJson = JsonOption
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait.", min=0.1, max=3600)]


class BadInput(SecFuNetError):
    """A file given on the command line is not what it should be."""
