"""Credentials that systemd gives a service: files in $CREDENTIALS_DIRECTORY, systemd.exec(5), LoadCredentialEncrypted=."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from secfunet.errors import SecFuNetError


class NoCredentialsError(SecFuNetError):
    """systemd has given this process no credentials."""


def _no_path(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise ValueError("is the name of a credential, not a path")
    return name


CredentialName = Annotated[str, AfterValidator(_no_path)]
"""In a settings file."""


def credential_path(name: str) -> Path:
    """Its file. Raises NoCredentialsError."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise NoCredentialsError(f"no credential '{name}': $CREDENTIALS_DIRECTORY is not set")
    return Path(folder) / name
