"""Static keys, the key derivation, and the session keys that come of it (Amendment D, 4.1.5 and 6.2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC

from secfunet.scp03.errors import Scp03FormatError

KEY_SIZES: Final = (16, 24, 32)
BLOCK: Final = 16


class ScpMode(Enum):
    """How long challenges, cryptograms and MACs are; the value is their size in bytes."""

    S8 = 8
    S16 = 16


class Derivation(IntEnum):
    """Derivation constants (Amendment D, table 4-1)."""

    CARD_CRYPTOGRAM = 0x00
    HOST_CRYPTOGRAM = 0x01
    CARD_CHALLENGE = 0x02
    S_ENC = 0x04
    S_MAC = 0x06
    S_RMAC = 0x07


@dataclass(frozen=True)
class KeySet:
    """Three AES keys of one size (16, 24 or 32 bytes): ENC and MAC make the session keys, DEK encrypts keys that are sent."""

    enc: bytes = field(repr=False)
    mac: bytes = field(repr=False)
    dek: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.enc) not in KEY_SIZES or not len(self.enc) == len(self.mac) == len(self.dek):
            raise Scp03FormatError("a key set has three AES keys of 16, 24 or 32 bytes each")

    @classmethod
    def split(cls, keys: bytes) -> KeySet:
        """ENC ‖ MAC ‖ DEK. Raises Scp03FormatError."""
        size = len(keys) // 3
        return cls(keys[:size], keys[size : 2 * size], keys[2 * size :])

    def joined(self) -> bytes:
        """The reverse of ``split``."""
        return self.enc + self.mac + self.dek

    def session_keys(self, host_challenge: bytes, card_challenge: bytes) -> SessionKeys:
        """The keys of one session; the challenges are its context."""
        context, bits = host_challenge + card_challenge, 8 * len(self.enc)
        return SessionKeys(
            enc=derive(self.enc, Derivation.S_ENC, bits, context),
            mac=derive(self.mac, Derivation.S_MAC, bits, context),
            rmac=derive(self.mac, Derivation.S_RMAC, bits, context),
        )


@dataclass(frozen=True)
class SessionKeys:
    """What protects commands (enc, mac) and answers (enc, rmac) of one session."""

    enc: bytes = field(repr=False)
    mac: bytes = field(repr=False)
    rmac: bytes = field(repr=False)


def derive(key: bytes, constant: Derivation, bits: int, context: bytes) -> bytes:
    """``bits``/8 bytes of the KDF in counter mode with AES-CMAC (SP 800-108, 5.1): label is 11 zeros and the constant, then 00, the
    length in bits (2), the counter (1), the context.
    """
    size, made = bits // 8, b""
    for counter in range(1, -(-size // BLOCK) + 1):
        data = bytes(11) + bytes((constant, 0)) + bits.to_bytes(2) + bytes((counter,)) + context
        made += cmac(key, data)
    return made[:size]


def cmac(key: bytes, data: bytes) -> bytes:
    """AES-CMAC (RFC 4493), 16 bytes."""
    mac = CMAC(algorithms.AES(key))
    mac.update(data)
    return mac.finalize()


def encrypt_cbc(key: bytes, iv: bytes, plaintext: bytes) -> bytes:
    """AES-CBC without padding."""
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(plaintext) + encryptor.finalize()


def decrypt_cbc(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """The reverse of encrypt_cbc; whole blocks only."""
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()
