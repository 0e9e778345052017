"""Key derivation of TLS 1.0, 1.2 and 1.3, as far as the docking host needs it.

In TLS 1.2 the card hands over a key block, which is cut here; in TLS 1.3 it hands over two traffic secrets, from which keys,
IVs and the next secrets (KeyUpdate) are derived. The PRFs serve tests and cards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from typing import Final

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import TLS_1_3, CipherSuite
from secfunet.tls.errors import TlsError, TlsProtocolError

MASTER_SECRET_LENGTH: Final = 48


def _p_hash(hash_name: str, secret: bytes, seed: bytes, length: int) -> bytes:
    """P_hash of RFC 5246, 5 (and RFC 2246, 5)."""
    out = bytearray()
    a = seed
    while len(out) < length:
        a = hmac.digest(secret, a, hash_name)
        out += hmac.digest(secret, a + seed, hash_name)
    return bytes(out[:length])


def prf_tls10(secret: bytes, label: bytes, seed: bytes, length: int) -> bytes:
    """Pseudo-random function of TLS 1.0 and 1.1: P_MD5 xor P_SHA-1 over the halves of the secret (RFC 2246, 5)."""
    half = (len(secret) + 1) // 2
    first = _p_hash("md5", secret[:half], label + seed, length)
    second = _p_hash("sha1", secret[len(secret) - half :], label + seed, length)
    return bytes(a ^ b for a, b in zip(first, second, strict=True))


def prf_tls12(hash_name: str, secret: bytes, label: bytes, seed: bytes, length: int) -> bytes:
    """Pseudo-random function of TLS 1.2 with the suite's hash (RFC 5246, 5)."""
    return _p_hash(hash_name, secret, label + seed, length)


def key_block_tls12(suite: CipherSuite, master_secret: bytes, client_random: bytes, server_random: bytes) -> bytes:
    """Return the key block of a TLS 1.2 session, as long as the suite needs (RFC 5246, 6.3)."""
    return prf_tls12(
        suite.hash_name, master_secret, b"key expansion", server_random + client_random, suite.key_block_length
    )


def hkdf_expand_label(hash_name: str, secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446, 7.1. ``label`` is given without its "tls13 " prefix."""
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes((len(full),)) + full + bytes((len(context),)) + context
    # HKDF-Expand of RFC 5869, 2.3: hashlib's HMAC is an order faster to set up than an object for each label.
    out, block = bytearray(), b""
    counter = 0
    while len(out) < length:
        counter += 1
        block = hmac.digest(secret, block + info + bytes((counter,)), hash_name)
        out += block
    return bytes(out[:length])


def derive_secret(hash_name: str, secret: bytes, label: bytes, messages: bytes) -> bytes:
    """Derive-Secret of RFC 8446, 7.1, over the transcript ``messages``."""
    digest = hashlib.new(hash_name, messages).digest()
    return hkdf_expand_label(hash_name, secret, label, digest, len(digest))


@dataclasses.dataclass(frozen=True, slots=True)
class DirectionKeys:
    """Keys that protect one direction. TLS 1.2: from the key block; TLS 1.3: from ``secret``, which KeyUpdate replaces."""

    key: bytes = dataclasses.field(repr=False)
    iv: bytes = dataclasses.field(repr=False)
    mac_key: bytes = dataclasses.field(repr=False, default=b"")
    secret: bytes = dataclasses.field(repr=False, default=b"")


def traffic_keys(suite: CipherSuite, secret: bytes) -> DirectionKeys:
    """Return write key and IV of a TLS 1.3 traffic secret (RFC 8446, 7.3)."""
    return DirectionKeys(
        key=hkdf_expand_label(suite.hash_name, secret, b"key", b"", suite.key_length),
        iv=hkdf_expand_label(suite.hash_name, secret, b"iv", b"", suite.fixed_iv_length),
        secret=secret,
    )


def next_traffic_keys(suite: CipherSuite, keys: DirectionKeys) -> DirectionKeys:
    """Return the keys after a KeyUpdate: application_traffic_secret_N+1 (RFC 8446, 7.2).

    Raises TlsProtocolError(unexpected_message) for keys that did not come from a traffic secret (TLS 1.2).
    """
    if not keys.secret:
        raise TlsProtocolError("a key update outside TLS 1.3", AlertDescription.UNEXPECTED_MESSAGE)
    return traffic_keys(suite, hkdf_expand_label(suite.hash_name, keys.secret, b"traffic upd", b"", suite.hash_length))


def split_hand_over(suite: CipherSuite, key_block: bytes) -> tuple[DirectionKeys, DirectionKeys]:
    """Cut what the card hands over into the client's and the server's write keys.

    ``key_block`` is the key block of RFC 5246, 6.3 (TLS 1.2), or client_application_traffic_secret_0 followed by
    server_application_traffic_secret_0 (TLS 1.3). Raises TlsError when its length does not fit the suite.
    """
    expected = 2 * suite.hash_length if suite.version == TLS_1_3 else suite.key_block_length
    if len(key_block) != expected:
        raise TlsError(f"the card handed over {len(key_block)} bytes of keys where {suite.name} needs {expected}")
    if suite.version == TLS_1_3:
        half = suite.hash_length
        return traffic_keys(suite, key_block[:half]), traffic_keys(suite, key_block[half:])
    pieces = []
    offset = 0
    for length in (suite.mac_length, suite.key_length, suite.fixed_iv_length):
        pieces.append((key_block[offset : offset + length], key_block[offset + length : offset + 2 * length]))
        offset += 2 * length
    (client_mac, server_mac), (client_key, server_key), (client_iv, server_iv) = pieces
    return (
        DirectionKeys(key=client_key, iv=client_iv, mac_key=client_mac),
        DirectionKeys(key=server_key, iv=server_iv, mac_key=server_mac),
    )
