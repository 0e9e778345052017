"""What the numbers of the TLS registry are called by OpenSSL: the suites and groups that a card can offer.

A suite that the docking host could not protect records with is not in the list, so it can never be negotiated.
"""

from __future__ import annotations

from typing import Final

from secfunet.tls.cipher_suites import SUITES, TLS_1_3, CipherSuite

_OPENSSL_SUITES: Final[dict[int, str]] = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
    0xC02B: "ECDHE-ECDSA-AES128-GCM-SHA256",
    0xC02C: "ECDHE-ECDSA-AES256-GCM-SHA384",
    0xC02F: "ECDHE-RSA-AES128-GCM-SHA256",
    0xC030: "ECDHE-RSA-AES256-GCM-SHA384",
    0xCCA8: "ECDHE-RSA-CHACHA20-POLY1305",
    0xCCA9: "ECDHE-ECDSA-CHACHA20-POLY1305",
    0x009C: "AES128-GCM-SHA256",
    0x009D: "AES256-GCM-SHA384",
    0x002F: "AES128-SHA",
    0x0035: "AES256-SHA",
    0x003C: "AES128-SHA256",
    0x003D: "AES256-SHA256",
    0xC009: "ECDHE-ECDSA-AES128-SHA",
    0xC00A: "ECDHE-ECDSA-AES256-SHA",
    0xC013: "ECDHE-RSA-AES128-SHA",
    0xC014: "ECDHE-RSA-AES256-SHA",
    0xC023: "ECDHE-ECDSA-AES128-SHA256",
    0xC024: "ECDHE-ECDSA-AES256-SHA384",
    0xC027: "ECDHE-RSA-AES128-SHA256",
    0xC028: "ECDHE-RSA-AES256-SHA384",
}

DEFAULT_SUITES: Final = (0x1301, 0x1302, 0x1303, 0xC02B, 0xC02F, 0xC02C, 0xC030, 0xCCA9, 0xCCA8)
"""Forward-secret AEAD suites."""

_OPENSSL_GROUPS: Final[dict[int, str]] = {
    0x0017: "P-256",
    0x0018: "P-384",
    0x0019: "P-521",
    0x001D: "X25519",
    0x001E: "X448",
    0x11EC: "X25519MLKEM768",
}

DEFAULT_GROUPS: Final = (0x001D, 0x0017, 0x0018)
"""No post-quantum hybrid by default: its share makes a ClientHello of 1.4 kB, six short APDUs. It is there to be asked for."""


def suite_of(number: int) -> CipherSuite | None:
    """The suite of this number if the card can run it, else None."""
    return SUITES.get(number) if number in _OPENSSL_SUITES else None


def tls13_suites(numbers: tuple[int, ...]) -> bytes:
    """The TLS 1.3 suites among ``numbers``, as OpenSSL wants them."""
    return ":".join(_OPENSSL_SUITES[number] for number in numbers if SUITES[number].version == TLS_1_3).encode()


def tls12_suites(numbers: tuple[int, ...]) -> bytes:
    """The TLS 1.2 suites among ``numbers``, as OpenSSL wants them."""
    return ":".join(_OPENSSL_SUITES[number] for number in numbers if SUITES[number].version != TLS_1_3).encode()


def groups_of(numbers: tuple[int, ...]) -> bytes | None:
    """The groups of these numbers as OpenSSL wants them, or None if the card does not know one of them."""
    if any(number not in _OPENSSL_GROUPS for number in numbers):
        return None
    return ":".join(_OPENSSL_GROUPS[number] for number in numbers).encode()
