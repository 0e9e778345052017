"""The data of PUT KEY: a new key set, each key encrypted by the static DEK of the one in use (Amendment D, 7.2; Card Specification, 11.8).

::

    80 D8 old-version 81   new version ‖ 3 × { 88  length  [key size]  encrypted key  03  check value (3) }
                           → new version ‖ 3 × check value

The key is encrypted by AES-CBC with a zero IV. A key of 24 bytes is padded to 32 (here with zeros) and then has its size before it, as the
Card Specification has it (11.8.2.3.1); for the other sizes either form is read, the one without is written.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Final

from secfunet.scp03.errors import Scp03FormatError, Scp03SecurityError
from secfunet.scp03.keys import BLOCK, KEY_SIZES, KeySet, decrypt_cbc, encrypt_cbc

INS_PUT_KEY: Final = 0xD8
FIRST_OF_SEVERAL: Final = 0x81
"""P2: the key identifier of the first key (01), and that several follow (80)."""
KEY_TYPE_AES: Final = 0x88
CHECK_VALUE_SIZE: Final = 3
KEYS: Final = 3
MAX_KEY_VERSION: Final = 0x7F


def key_check_value(key: bytes) -> bytes:
    """The first 3 bytes of sixteen 01 encrypted by an AES key (Card Specification, B.6)."""
    return encrypt_cbc(key, bytes(BLOCK), b"\1" * BLOCK)[:CHECK_VALUE_SIZE]


@dataclass(frozen=True)
class PutKey:
    """A new key set and its version (1 to 127)."""

    version: int
    keys: KeySet

    def __post_init__(self) -> None:
        if not 1 <= self.version <= MAX_KEY_VERSION:
            raise Scp03FormatError("a key version is 1 to 127")

    @property
    def receipt(self) -> bytes:
        """What the card answers: the version and the three check values (10 bytes)."""
        keys = (self.keys.enc, self.keys.mac, self.keys.dek)
        return bytes((self.version,)) + b"".join(key_check_value(key) for key in keys)

    def encode(self, dek: bytes) -> bytes:
        """Under the DEK in use, which is not to be weaker than what it carries."""
        encoded = bytes((self.version,))
        for key in (self.keys.enc, self.keys.mac, self.keys.dek):
            padding = -len(key) % BLOCK
            block = encrypt_cbc(dek, bytes(BLOCK), key + bytes(padding))
            if padding:
                block = bytes((len(key),)) + block
            encoded += bytes((KEY_TYPE_AES, len(block))) + block + bytes((CHECK_VALUE_SIZE,)) + key_check_value(key)
        return encoded

    @classmethod
    def decode(cls, untrusted: bytes, dek: bytes) -> PutKey:
        """Raises Scp03FormatError, and Scp03SecurityError if a check value is wrong: the keys were encrypted under another DEK."""
        if not untrusted:
            raise Scp03FormatError("a key set begins with its version")
        keys: list[bytes] = []
        rest = untrusted[1:]
        while rest:
            if len(keys) == KEYS:
                raise Scp03FormatError("more than three keys")
            key, rest = _key(rest, dek)
            keys.append(key)
        if len(keys) != KEYS:
            raise Scp03FormatError("a key set has three keys")
        return cls(untrusted[0], KeySet(*keys))


def _key(untrusted: bytes, dek: bytes) -> tuple[bytes, bytes]:
    """One key, and what follows it."""
    if len(untrusted) < 2 or untrusted[0] != KEY_TYPE_AES:
        raise Scp03FormatError("a key is of type AES")
    end = 2 + untrusted[1]
    block, check = untrusted[2:end], untrusted[end : end + 1 + CHECK_VALUE_SIZE]
    if len(block) != untrusted[1] or len(check) != 1 + CHECK_VALUE_SIZE or check[0] != CHECK_VALUE_SIZE:
        raise Scp03FormatError("a key or its check value is cut off")
    size = len(block)
    if size % BLOCK == 1:
        size, block = block[0], block[1:]
    if size not in KEY_SIZES or len(block) != -(-size // BLOCK) * BLOCK:
        raise Scp03FormatError("an AES key has 16, 24 or 32 bytes")
    key = decrypt_cbc(dek, bytes(BLOCK), block)[:size]
    if not hmac.compare_digest(key_check_value(key), check[1:]):
        raise Scp03SecurityError("the check value of a key is wrong")
    return key, untrusted[end + 1 + CHECK_VALUE_SIZE :]
