"""What settings files say about a card of this host: where it is, and where its user's PIN comes from."""

from __future__ import annotations

from typing import Annotated, Final, Self

import typer
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from secfunet.card.errors import CardFormatError
from secfunet.card.parameters import Segmentation
from secfunet.card.place import CardPlace, PcscPlace
from secfunet.service.credentials import CredentialName, credential_path
from secfunet.service.files import read_secret
from secfunet.service.settings import FilePath, Settings

_PIN_FILE: Final = 64
"""Bytes of a PIN's file at most."""


class PcscSettings(Settings):
    """A reader: ``daemon`` is the socket of its pcscd (None: the system's), ``segmentation`` how long the card's APDUs are."""

    reader: str = Field(min_length=1, max_length=127)
    daemon: FilePath | None = None
    segmentation: Segmentation = Segmentation.EXTENDED

    @property
    def place(self) -> PcscPlace:
        """Where that is."""
        return PcscPlace(self.reader, self.daemon, self.segmentation)

    @model_validator(mode="after")
    def _is_a_place(self) -> Self:
        try:
            _ = self.place
        except CardFormatError as error:
            raise ValueError(str(error)) from None
        return self


def _by_its_name(untrusted: object) -> object:
    return {"reader": untrusted} if isinstance(untrusted, str) else untrusted


Pcsc = Annotated[PcscSettings, BeforeValidator(_by_its_name)]
"""A table, or the reader's name alone."""


class LocalCardSettings(Settings):
    """A card of this host: ``socket`` or ``pcsc``."""

    socket: FilePath | None = None
    pcsc: Pcsc | None = None

    @property
    def card_segmentation(self) -> Segmentation:
        """How long the APDUs are that the card takes."""
        return Segmentation.EXTENDED if self.pcsc is None else self.pcsc.segmentation

    @property
    def local_place(self) -> CardPlace | None:
        """Where it is on this host; None: nowhere."""
        return self.socket if self.pcsc is None else self.pcsc.place


class CardUserSettings(LocalCardSettings):
    """A card and its user's PIN, from exactly one of: a file (mode 0600), a credential of systemd, or whoever starts the program."""

    user_pin_file: FilePath | None = None
    user_pin_credential: CredentialName | None = None
    user_pin_prompt: bool = False
    _typed: bytes | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_pin(self) -> Self:
        given = (self.user_pin_file is not None, self.user_pin_credential is not None, self.user_pin_prompt)
        if sum(given) != 1:
            raise ValueError("needs exactly one of 'user_pin_file', 'user_pin_credential' and 'user_pin_prompt'")
        return self

    @property
    def pin_source(self) -> str:
        """What a person calls the place that the PIN comes from."""
        if self.user_pin_prompt:
            return "that was typed"
        if self.user_pin_credential is not None:
            return f"in the credential '{self.user_pin_credential}'"
        return f"in {self.user_pin_file}"

    def ask_for_pin(self, card: str) -> None:
        """If the PIN is to be typed: asks the terminal for it, once. It stays in memory; a wrong one is not asked for again."""
        if self.user_pin_prompt:
            self._typed = str(typer.prompt(f"PIN of {card}", hide_input=True, err=True)).encode()

    def read_pin(self) -> bytes:
        """The PIN as it is now. Raises UnsafeFileError, OSError, NoCredentialsError, CardFormatError if nobody was asked."""
        if self.user_pin_prompt:
            if self._typed is None:
                raise CardFormatError("this card's PIN is to be typed: only 'serve' asks for it")
            return self._typed
        path = self.user_pin_file if self.user_pin_credential is None else credential_path(self.user_pin_credential)
        if path is None:
            raise AssertionError("the settings give every card one source of its PIN")
        return read_secret(path, limit=_PIN_FILE).strip()
