"""What an administrator decides about one card: a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import typer
from pydantic import Field, model_validator

from secfunet.card.place import CardPlace
from secfunet.card.settings import LocalCardSettings
from secfunet.service.credentials import CredentialName, NoCredentialsError, credential_path
from secfunet.service.files import read_secret
from secfunet.service.settings import FilePath, Settings, form
from secure_element.applet import CardOptions, SessionKeyOrder
from secure_element.eap_engine import EAP_FRAGMENT
from secure_element.errors import StoreError
from secure_element.latency import LatencySettings
from secure_element.segmentation import AnswerStyle
from secure_element.store import StoreSecret


class StoreKeySettings(Settings):
    """Where the store's key comes from: exactly one of the three."""

    file: FilePath | None = None  # mode 0600; ``secure-element init`` makes it if it is missing
    credential: CredentialName | None = None  # a name in $CREDENTIALS_DIRECTORY (systemd: LoadCredentialEncrypted=)
    prompt: bool = False  # a passphrase, typed at start

    @model_validator(mode="after")
    def _just_one(self) -> Self:
        if sum((self.file is not None, self.credential is not None, self.prompt)) != 1:
            raise ValueError("needs exactly one of file, credential and prompt")
        return self

    def path(self) -> Path | None:
        """The file that holds the key; None: somebody types it. Raises StoreError if systemd gave no credentials."""
        if self.credential is None:
            return self.file
        try:
            return credential_path(self.credential)
        except NoCredentialsError as error:
            raise StoreError(str(error)) from None

    def read(self, *, confirm: bool = False) -> StoreSecret:
        """The secret. Raises StoreError, UnsafeFileError, OSError; asks the terminal if it is a passphrase."""
        path = self.path()
        if path is None:
            passphrase = typer.prompt("Passphrase of the store", hide_input=True, confirmation_prompt=confirm, err=True)
            return StoreSecret(str(passphrase).encode(), is_passphrase=True)
        return StoreSecret(read_secret(path).strip(b"\r\n"))  # a line of text, wherever it is kept


Loopback = Annotated[
    str, form(r"^(127\.0\.0\.1|\[::1\]|localhost):[0-9]{1,5}$", "a port of this host's loopback (127.0.0.1:35963)")
]


class CardSettings(LocalCardSettings):
    """One secure element: it listens at ``socket``, or attaches itself to a virtual reader (vpcd) that listens at ``attach``.

    ``pcsc``: the name of that reader, by which this card's own commands find it.
    """

    attach: Loopback | None = None
    store: FilePath
    store_key: StoreKeySettings
    segmentation: AnswerStyle = AnswerStyle.DRAFT
    session_key_order: SessionKeyOrder = SessionKeyOrder.TRACE
    legacy_tls: bool = False
    eap_fragment: Annotated[int, Field(ge=64, le=2900)] = EAP_FRAGMENT
    socket_mode: Annotated[str, form("^0[0-7]{3}$", 'permissions in octal, as text ("0660")')] = "0600"
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # None, as it is for every card that serves somebody: answers leave as soon as they are there.
    benchmark_latency: LatencySettings | None = None

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if (self.socket is None) == (self.attach is None):
            raise ValueError("a card has either a 'socket' to listen at or a reader to 'attach' itself to")
        if self.attach is None and self.pcsc is not None:
            raise ValueError("'pcsc' is the reader of a card with 'attach'")
        return self

    @property
    def place(self) -> CardPlace:
        """Where the card is, once it is served. Raises StoreError if only its reader's port is known."""
        if self.local_place is None:
            raise StoreError("the settings do not say the reader's name: add 'pcsc'")
        return self.local_place

    @property
    def reader_address(self) -> tuple[str, int] | None:
        """Host and port of the virtual reader."""
        if self.attach is None:
            return None
        host, _, port = self.attach.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def options(self) -> CardOptions:
        """What the card itself needs to know."""
        return CardOptions(self.segmentation, self.session_key_order, self.legacy_tls, self.eap_fragment)
