"""What an administrator decides about one card: a TOML file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import Field, field_validator, model_validator

from secfunet.service.files import read_secret
from secfunet.service.settings import FilePath, Settings
from secure_element.applet import CardOptions, SessionKeyOrder
from secure_element.eap_engine import EAP_FRAGMENT
from secure_element.errors import StoreError
from secure_element.segmentation import AnswerStyle
from secure_element.store import StoreSecret


class StoreKeySettings(Settings):
    """Where the store's key comes from: exactly one of the three."""

    file: FilePath | None = None  # mode 0600; ``secure-element init`` makes it if it is missing
    credential: str | None = None  # a name in $CREDENTIALS_DIRECTORY (systemd: LoadCredentialEncrypted=)
    prompt: bool = False  # a passphrase, typed at start

    @field_validator("credential")
    @classmethod
    def _no_path(cls, name: str | None) -> str | None:
        if name is not None and (not name or "/" in name or name.startswith(".")):
            raise ValueError("is the name of a credential, not a path")
        return name

    @model_validator(mode="after")
    def _just_one(self) -> StoreKeySettings:
        if sum((self.file is not None, self.credential is not None, self.prompt)) != 1:
            raise ValueError("needs exactly one of file, credential and prompt")
        return self

    def path(self) -> Path | None:
        """The file that holds the key; None: somebody types it. Raises StoreError if systemd gave no credentials."""
        if self.credential is None:
            return self.file
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise StoreError(f"no credential '{self.credential}': $CREDENTIALS_DIRECTORY is not set")
        return Path(folder) / self.credential

    def read(self, *, confirm: bool = False) -> StoreSecret:
        """The secret. Raises StoreError, UnsafeFileError, OSError; asks the terminal if it is a passphrase."""
        path = self.path()
        if path is None:
            passphrase = typer.prompt("Passphrase of the store", hide_input=True, confirmation_prompt=confirm, err=True)
            return StoreSecret(str(passphrase).encode(), is_passphrase=True)
        return StoreSecret(read_secret(path).strip(b"\r\n"))  # a line of text, wherever it is kept


class CardSettings(Settings):
    """One secure element."""

    socket: FilePath
    store: FilePath
    store_key: StoreKeySettings
    segmentation: AnswerStyle = AnswerStyle.DRAFT
    session_key_order: SessionKeyOrder = SessionKeyOrder.TRACE
    legacy_tls: bool = False
    eap_fragment: Annotated[int, Field(ge=64, le=2900)] = EAP_FRAGMENT
    socket_mode: Annotated[str, Field(pattern="^0[0-7]{3}$")] = "0600"
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def options(self) -> CardOptions:
        """What the card itself needs to know."""
        return CardOptions(self.segmentation, self.session_key_order, self.legacy_tls, self.eap_fragment)
