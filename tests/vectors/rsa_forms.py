"""Encoded messages of RFC 8017, right and wrong ones, built byte by byte, and the bare RSA function over them: for vectors made here."""

from __future__ import annotations

import hashlib
import os
from functools import cache

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

DIGEST_INFO = {
    "sha1": "3021300906052b0e03021a05000414",
    "sha256": "3031300d060960864801650304020105000420",
    "sha384": "3041300d060960864801650304020205000430",
    "sha512": "3051300d060960864801650304020305000440",
}
"""DER before the hash (RFC 8017, 9.2, note 1)."""


@cache
def key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """One key of each size."""
    return rsa.generate_private_key(65537, bits)


def pkcs8(bits: int = 2048) -> bytes:
    return key(bits).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def modulus(bits: int = 2048) -> int:
    return key(bits).public_key().public_numbers().n


def public_operation(encoded: bytes, bits: int = 2048) -> bytes:
    """RSAEP of an encoded message."""
    number = int.from_bytes(encoded)
    assert number < modulus(bits)
    return pow(number, 65537, modulus(bits)).to_bytes(bits // 8)


def private_operation(encoded: bytes, bits: int = 2048) -> bytes:
    """RSASP1 of an encoded message."""
    number = int.from_bytes(encoded)
    assert number < modulus(bits)
    return pow(number, key(bits).private_numbers().d, modulus(bits)).to_bytes(bits // 8)


def mgf1(seed: bytes, size: int, hash_name: str) -> bytes:
    made = b""
    for counter in range(-(-size // hashlib.new(hash_name).digest_size)):
        made += hashlib.new(hash_name, seed + counter.to_bytes(4)).digest()
    return made[:size]


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def oaep(
    message: bytes,
    *,
    hash_name: str = "sha256",
    mgf_hash: str | None = None,
    label: bytes = b"",
    first: int = 0,
    separator: int = 1,
    padding: int = 0,
    size: int = 256,
) -> bytes:
    """EM of EME-OAEP (RFC 8017, 7.1.1)."""
    length = hashlib.new(hash_name).digest_size
    tail = bytes((separator,)) + message
    block = hashlib.new(hash_name, label).digest()
    block += bytes((padding,)) * (size - 1 - 2 * length - len(tail)) + tail
    seed = os.urandom(length)
    masked = xor(block, mgf1(seed, len(block), mgf_hash or hash_name))
    masked_seed = xor(seed, mgf1(masked, length, mgf_hash or hash_name))
    return bytes((first,)) + masked_seed + masked


def v1_5(message: bytes, *, first: int = 0, kind: int = 2, fill: int | None = None, size: int = 256) -> bytes:
    """EM of EME-PKCS1-v1_5 (RFC 8017, 7.2.1); ``fill``: bytes of padding, all that there is room for if None."""
    fill = size - 3 - len(message) if fill is None else fill
    return bytes((first, kind)) + nonzero(fill) + b"\0" + message


def nonzero(size: int) -> bytes:
    return bytes(1 + byte % 255 for byte in os.urandom(size))


def signature_form(
    message: bytes,
    *,
    hash_name: str = "sha256",
    digest_info: bytes | None = None,
    fill: int | None = None,
    behind: bytes = b"",
    kind: int = 1,
    filler: int = 0xFF,
    size: int = 256,
) -> bytes:
    """EM of EMSA-PKCS1-v1_5 (RFC 8017, 9.2), as long as the modulus; ``fill``: bytes of padding."""
    if digest_info is None:
        digest_info = bytes.fromhex(DIGEST_INFO[hash_name])
    tail = digest_info + hashlib.new(hash_name, message).digest() + behind
    fill = size - 3 - len(tail) if fill is None else fill
    encoded = bytes((0, kind)) + bytes((filler,)) * fill + b"\0" + tail
    return encoded + bytes(size - len(encoded))


def pss(
    message: bytes,
    *,
    salt: int = 32,
    hash_name: str = "sha256",
    mgf_hash: str | None = None,
    trailer: int = 0xBC,
    separator: int = 1,
    top_bit: bool = False,
    bits: int = 2048,
) -> bytes:
    """EM of EMSA-PSS (RFC 8017, 9.1.1)."""
    length, size = hashlib.new(hash_name).digest_size, bits // 8
    salt_bytes = os.urandom(salt)
    digest = hashlib.new(hash_name, bytes(8) + hashlib.new(hash_name, message).digest() + salt_bytes).digest()
    block = bytes(size - salt - length - 2) + bytes((separator,)) + salt_bytes
    masked = bytearray(xor(block, mgf1(digest, len(block), mgf_hash or hash_name)))
    masked[0] &= 0x7F
    if top_bit:
        masked[0] |= 0x80
    return bytes(masked) + digest + bytes((trailer,))
