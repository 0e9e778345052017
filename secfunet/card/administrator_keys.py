"""The file of an administrator's SCP03 keys: TOML, mode 0600; whoever has it administers the card.

::

    version = 1        # of the key set, 1 to 127
    enc = "…"          # AES-128, -192 or -256, hexadecimal
    mac = "…"
    dek = "…"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from secfunet.card.errors import CardFormatError
from secfunet.scp03 import KeySet, PutKey, Scp03FormatError
from secfunet.service.files import private_folder, read_secret, write_atomically

KEY_SIZE: Final = 32
"""Bytes of the keys that are made here: AES-256."""

_KEYS: Final = ("enc", "mac", "dek")


@dataclass(frozen=True)
class AdministratorKeys:
    """One key set of one card."""

    version: int
    keys: KeySet

    def __post_init__(self) -> None:
        PutKey(self.version, self.keys)  # raises Scp03FormatError for a version that is none

    @classmethod
    def generate(
        cls, version: int = 1, *, size: int = KEY_SIZE, randbytes: Callable[[int], bytes] = os.urandom
    ) -> AdministratorKeys:
        """Random keys of ``size`` bytes each."""
        return cls(version, KeySet.split(randbytes(3 * size)))

    @classmethod
    def read(cls, path: Path) -> AdministratorKeys:
        """Raises CardFormatError, UnsafeFileError (others may read it), OSError."""
        try:
            document = tomllib.loads(read_secret(path, limit=4096).decode())
            if set(document) != {"version", *_KEYS} or type(document["version"]) is not int:
                raise ValueError
            return cls(document["version"], KeySet(*(bytes.fromhex(document[name]) for name in _KEYS)))
        except (ValueError, TypeError, Scp03FormatError):
            # No text of a parser: it may show what is in the file.
            raise CardFormatError(f"{path} holds no administrator's keys: version, enc, mac and dek") from None

    def write(self, path: Path) -> None:
        """Mode 0600, in one step."""
        private_folder(path.parent)
        lines = [f"version = {self.version}", *(f'{name} = "{getattr(self.keys, name).hex()}"' for name in _KEYS)]
        write_atomically(path, ("\n".join(lines) + "\n").encode())
