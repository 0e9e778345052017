"""Certificate signing requests whose key makes the check of their signature slow, unless somebody looks at the key first."""

from __future__ import annotations

import functools
import secrets

from cryptography.hazmat.primitives.asymmetric import rsa


@functools.cache
def _modulus(bits: int) -> int:
    return rsa.generate_private_key(65537, bits).public_key().public_numbers().n


def request_with_exponent(bits: int, exponent_bits: int) -> bytes:
    """A PKCS#10 request (DER) for an RSA key whose public exponent has that size; its signature is wrong."""
    modulus = _modulus(bits)
    exponent = secrets.randbits(exponent_bits) | (1 << (exponent_bits - 1)) | 1 if exponent_bits > 17 else 65537
    if exponent >= modulus:
        exponent -= modulus & ~1
    numbers = _der(0x30, _integer(modulus) + _integer(exponent))
    algorithm = _der(0x30, bytes.fromhex("06092a864886f70d0101010500"))
    key = _der(0x30, algorithm + _der(3, b"\0" + numbers))
    info = _der(0x30, _integer(0) + _der(0x30, b"") + key + _der(0xA0, b""))
    signature = _der(3, b"\0" + secrets.token_bytes(bits // 8 - 1).rjust(bits // 8, b"\0"))
    return _der(0x30, info + _der(0x30, bytes.fromhex("06092a864886f70d01010b0500")) + signature)


def _der(tag: int, body: bytes) -> bytes:
    size = len(body)
    length = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + body


def _integer(number: int) -> bytes:
    return _der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))
