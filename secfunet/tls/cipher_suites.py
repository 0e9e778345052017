"""The cipher suites whose records this host can protect (IANA "TLS Cipher Suites"; RFC 5246, 5288, 7905, 8446).

``LEGACY`` suites (no forward secrecy, or CBC) exist for peers of the paper's era and are used only where configured.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from secfunet.tls.errors import UnsupportedSuiteError

TLS_1_2: Final = 0x0303
TLS_1_3: Final = 0x0304


class Cipher(enum.Enum):
    """The bulk cipher of a suite."""

    AES_GCM = "aes-gcm"
    CHACHA20_POLY1305 = "chacha20-poly1305"
    AES_CBC = "aes-cbc"


@dataclasses.dataclass(frozen=True, slots=True)
class CipherSuite:
    """What the record layer must know of one suite. All lengths in bytes."""

    number: int
    name: str
    version: int
    """0x0303 or 0x0304: no suite of this registry serves both."""
    cipher: Cipher
    key_length: int
    fixed_iv_length: int
    """Of the key block: 4 for AES-GCM (RFC 5288), 12 for ChaCha20 (RFC 7905) and TLS 1.3, 0 for CBC (explicit IVs)."""
    hash_name: str
    """Hash of the PRF or of HKDF, as hashlib names it."""
    mac_name: str = ""
    """Hash of the records' HMAC; empty for AEAD."""
    mac_length: int = 0
    forward_secret: bool = True

    @property
    def is_legacy(self) -> bool:
        """Whether it needs explicit configuration: CBC, or a key exchange without forward secrecy."""
        return self.cipher is Cipher.AES_CBC or not self.forward_secret

    @property
    def key_block_length(self) -> int:
        """Length of the TLS 1.2 key block: two MAC keys, two keys, two IVs (RFC 5246, 6.3)."""
        return 2 * (self.mac_length + self.key_length + self.fixed_iv_length)

    @property
    def hash_length(self) -> int:
        """Output length of the hash: also that of a TLS 1.3 traffic secret."""
        return {"sha1": 20, "sha256": 32, "sha384": 48}[self.hash_name]


def _aead13(number: int, name: str, cipher: Cipher, key: int, hash_name: str) -> CipherSuite:
    return CipherSuite(number, name, TLS_1_3, cipher, key, 12, hash_name)


def _gcm(number: int, name: str, key: int, hash_name: str, *, forward_secret: bool) -> CipherSuite:
    return CipherSuite(number, name, TLS_1_2, Cipher.AES_GCM, key, 4, hash_name, forward_secret=forward_secret)


def _chacha(number: int, name: str) -> CipherSuite:
    return CipherSuite(number, name, TLS_1_2, Cipher.CHACHA20_POLY1305, 32, 12, "sha256")


_MAC_LENGTH: Final = {"sha1": 20, "sha256": 32, "sha384": 48}


def _cbc(number: int, name: str, key: int, mac: str, *, forward_secret: bool) -> CipherSuite:
    # The PRF of a TLS 1.2 suite is SHA-256 unless the suite itself says SHA-384 (RFC 5246, 5; RFC 5289, 3).
    prf = "sha384" if mac == "sha384" else "sha256"
    return CipherSuite(
        number, name, TLS_1_2, Cipher.AES_CBC, key, 0, prf, mac, _MAC_LENGTH[mac], forward_secret=forward_secret
    )


_ALL: Final = (
    _aead13(0x1301, "TLS_AES_128_GCM_SHA256", Cipher.AES_GCM, 16, "sha256"),
    _aead13(0x1302, "TLS_AES_256_GCM_SHA384", Cipher.AES_GCM, 32, "sha384"),
    _aead13(0x1303, "TLS_CHACHA20_POLY1305_SHA256", Cipher.CHACHA20_POLY1305, 32, "sha256"),
    _gcm(0xC02B, "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", 16, "sha256", forward_secret=True),
    _gcm(0xC02C, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", 32, "sha384", forward_secret=True),
    _gcm(0xC02F, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", 16, "sha256", forward_secret=True),
    _gcm(0xC030, "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", 32, "sha384", forward_secret=True),
    _gcm(0x009E, "TLS_DHE_RSA_WITH_AES_128_GCM_SHA256", 16, "sha256", forward_secret=True),
    _gcm(0x009F, "TLS_DHE_RSA_WITH_AES_256_GCM_SHA384", 32, "sha384", forward_secret=True),
    _gcm(0x009C, "TLS_RSA_WITH_AES_128_GCM_SHA256", 16, "sha256", forward_secret=False),
    _gcm(0x009D, "TLS_RSA_WITH_AES_256_GCM_SHA384", 32, "sha384", forward_secret=False),
    _chacha(0xCCA8, "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"),
    _chacha(0xCCA9, "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
    _chacha(0xCCAA, "TLS_DHE_RSA_WITH_CHACHA20_POLY1305_SHA256"),
    _cbc(0x002F, "TLS_RSA_WITH_AES_128_CBC_SHA", 16, "sha1", forward_secret=False),
    _cbc(0x0035, "TLS_RSA_WITH_AES_256_CBC_SHA", 32, "sha1", forward_secret=False),
    _cbc(0x003C, "TLS_RSA_WITH_AES_128_CBC_SHA256", 16, "sha256", forward_secret=False),
    _cbc(0x003D, "TLS_RSA_WITH_AES_256_CBC_SHA256", 32, "sha256", forward_secret=False),
    _cbc(0x0033, "TLS_DHE_RSA_WITH_AES_128_CBC_SHA", 16, "sha1", forward_secret=True),
    _cbc(0x0039, "TLS_DHE_RSA_WITH_AES_256_CBC_SHA", 32, "sha1", forward_secret=True),
    _cbc(0x0067, "TLS_DHE_RSA_WITH_AES_128_CBC_SHA256", 16, "sha256", forward_secret=True),
    _cbc(0x006B, "TLS_DHE_RSA_WITH_AES_256_CBC_SHA256", 32, "sha256", forward_secret=True),
    _cbc(0xC009, "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA", 16, "sha1", forward_secret=True),
    _cbc(0xC00A, "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA", 32, "sha1", forward_secret=True),
    _cbc(0xC013, "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", 16, "sha1", forward_secret=True),
    _cbc(0xC014, "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA", 32, "sha1", forward_secret=True),
    _cbc(0xC023, "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256", 16, "sha256", forward_secret=True),
    _cbc(0xC024, "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA384", 32, "sha384", forward_secret=True),
    _cbc(0xC027, "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256", 16, "sha256", forward_secret=True),
    _cbc(0xC028, "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA384", 32, "sha384", forward_secret=True),
)

SUITES: Final[dict[int, CipherSuite]] = {suite.number: suite for suite in _ALL}


def suite_of(number: int, *, allow_legacy: bool) -> CipherSuite:
    """Return the suite with this IANA number.

    Raises UnsupportedSuiteError when it is not in the registry, or is legacy and not allowed.
    """
    suite = SUITES.get(number)
    if suite is None:
        raise UnsupportedSuiteError(number, "is unknown here")
    if suite.is_legacy and not allow_legacy:
        raise UnsupportedSuiteError(number, f"({suite.name}) is legacy and not configured")
    return suite
