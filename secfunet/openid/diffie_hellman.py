"""Diffie-Hellman as OpenID uses it to hand over a MAC key (§8.2.3, §8.4.2), with its numbers as btwoc and base64 (§4.2).

The default prime has 1024 bits, as the specification wants; what protects the key today is the TLS connection around it. Both sides'
keys live for one exchange.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from secfunet.openid.errors import OpenIdFormatError

# §B. "Default Diffie-Hellman Modulus".
DEFAULT_MODULUS = int(
    "DCF93A0B883972EC0E19989AC5A2CE310E1D37717E8D9571BB7623731866E61E"
    "F75A2E27898B057F9891C2E27A639C3F29B60814581CD3B2CA3986D268370557"
    "7D45C2E7E52DC81C7A171876E5CEA74B1448BFDFAF18828EFD2519F14E45E382"
    "6634AF1949E5B535CC829A483B8A76223E5D490A257F05BDFF16F2FB22C583AB",
    16,
)
DEFAULT_GENERATOR = 2

MIN_MODULUS_BITS = 1024
MAX_MODULUS_BITS = 2048  # an exponentiation costs about 20 ms there: what a stranger may make us spend
_MAX_BASE64 = 512


def btwoc(number: int) -> bytes:
    """Shortest big-endian two's complement of a number that is not negative (§4.2): a leading zero byte where the top bit is set."""
    if number < 0:
        raise ValueError("btwoc of a negative number")
    return number.to_bytes(number.bit_length() // 8 + 1, "big")


def encode_number(number: int) -> str:
    """Base64 of btwoc."""
    return base64.b64encode(btwoc(number)).decode("ascii")


def decode_number(untrusted: str) -> int:
    """The inverse of encode_number. A longer form than btwoc's is read too (peers send one); a negative number is refused."""
    raw = decode_base64(untrusted, limit=_MAX_BASE64)
    if not raw or raw[0] & 0x80:
        raise OpenIdFormatError("a Diffie-Hellman number is empty or negative")
    return int.from_bytes(raw, "big")


def decode_base64(untrusted: str, *, limit: int) -> bytes:
    """Strict base64 of at most ``limit`` characters."""
    if len(untrusted) > limit:
        raise OpenIdFormatError("a base64 value is too long")
    try:
        return base64.b64decode(untrusted.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise OpenIdFormatError("a value is not base64") from None


@dataclass(frozen=True)
class DhGroup:
    """A modulus and a generator. Raises OpenIdFormatError for what is no group at all, or too small or too large."""

    modulus: int = DEFAULT_MODULUS
    generator: int = DEFAULT_GENERATOR

    def __post_init__(self) -> None:
        if not MIN_MODULUS_BITS <= self.modulus.bit_length() <= MAX_MODULUS_BITS or self.modulus % 2 == 0:
            raise OpenIdFormatError("the Diffie-Hellman modulus is no odd number of 1024 to 2048 bits")
        if not 1 < self.generator < self.modulus - 1:
            raise OpenIdFormatError("the Diffie-Hellman generator is out of range")


@dataclass(frozen=True)
class DhKey:
    """One side's key pair for one exchange."""

    group: DhGroup
    private: int = field(repr=False)

    @classmethod
    def generate(cls, group: DhGroup, randbytes: Callable[[int], bytes]) -> DhKey:
        """A private exponent in [1, p-2]; 16 surplus random bytes make the reduction's bias negligible (NIST SP 800-56A, 5.6.1.1.3)."""
        size = (group.modulus.bit_length() + 7) // 8 + 16
        return cls(group, int.from_bytes(randbytes(size), "big") % (group.modulus - 2) + 1)

    @property
    def public(self) -> int:
        return pow(self.group.generator, self.private, self.group.modulus)

    def mask(self, peer_public: int, mac_key: bytes, hash_name: str) -> bytes:
        """H(btwoc(g^xy)) XOR mac_key (§8.2.3): hides the MAC key, or brings it back.

        Raises OpenIdFormatError if the peer's number is one for which the secret is known beforehand (0, 1, p-1), or the MAC key is not as
        long as the hash.
        """
        if not 1 < peer_public < self.group.modulus - 1:
            raise OpenIdFormatError("the peer's Diffie-Hellman number is out of range")
        shared = pow(peer_public, self.private, self.group.modulus)
        digest = hashlib.new(hash_name, btwoc(shared)).digest()
        if len(digest) != len(mac_key):
            raise OpenIdFormatError("a MAC key is not as long as the hash that hides it")
        return bytes(a ^ b for a, b in zip(digest, mac_key, strict=True))
