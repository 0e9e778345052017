"""A user's token: what travels in a container from an authority into one card, and is kept there.

The source is section 4.1 of the SecFuNet paper: an attribute of a user is packed into a container (``secfunet.container``) for the key
of the user's EAP-TLS card, and signed by an authority that the card trusts by its public key. The paper leaves open what keeps a
container from being loaded twice, or into a card for which it was not made; so the plaintext says both. Items, all there, in this order,
tag (1) ‖ length (2) ‖ value:

    01  counter    8      the authority's, growing with each token that it makes; a card takes only one above the last it has taken
    02  recipient  32     SHA-256 of the SubjectPublicKeyInfo (DER) of the card's key
    03  name       1–32   printable ASCII without space
    04  value      0–4096 the token itself: bytes that mean something to whoever asks the user for them
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from secfunet.card.errors import CardFormatError
from secfunet.card.tlv import decode_tlv, encode_tlv
from secfunet.errors import SecFuNetError

MAX_NAME: Final = 32
MAX_VALUE: Final = 4096
MAX_COUNTER: Final = 2**63 - 1
DIGEST_SIZE: Final = 32
MAX_PLAINTEXT: Final = 4 * 3 + 8 + DIGEST_SIZE + MAX_NAME + MAX_VALUE
"""Bytes of the longest plaintext."""
MAX_CONTAINER: Final = 512 + 16 + (MAX_PLAINTEXT // 16 + 1) * 16 + 512
"""Bytes of the longest container: with RSA-4096 at both ends."""

_COUNTER, _RECIPIENT, _NAME, _VALUE = 1, 2, 3, 4
_COUNTER_SIZE: Final = 8
MIN_KEY_BITS, MAX_KEY_BITS = 2048, 4096


class UserTokenError(SecFuNetError):
    """Bytes, a name or a key that no user's token has."""


def key_digest(public_key_der: bytes) -> bytes:
    """How cards and authorities call a public key: SHA-256 of its SubjectPublicKeyInfo (DER), 32 bytes."""
    return hashlib.sha256(public_key_der).digest()


def public_key_der(key: rsa.RSAPublicKey) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_authority_key(untrusted: bytes) -> rsa.RSAPublicKey:
    """The public key of an authority of tokens (SubjectPublicKeyInfo, DER, in exactly one encoding): RSA of 2048 to 4096 bits, in whole
    bytes, with an exponent of at least 65537.

    Raises UserTokenError.
    """
    try:
        key = load_der_public_key(untrusted) if len(untrusted) <= 2 * MAX_KEY_BITS // 8 else None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if (
        not isinstance(key, rsa.RSAPublicKey)
        or not MIN_KEY_BITS <= key.key_size <= MAX_KEY_BITS
        or key.key_size % 8
        or key.public_numbers().e < 65537
        or public_key_der(key) != untrusted
    ):
        raise UserTokenError("an authority's public key is RSA of 2048 to 4096 bits, SubjectPublicKeyInfo in DER")
    return key


@dataclass(frozen=True)
class UserToken:
    """One token, as it is inside its container. ``recipient`` is a key_digest. Raises UserTokenError for values out of bounds."""

    counter: int
    recipient: bytes
    name: str
    value: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.counter <= MAX_COUNTER:
            raise UserTokenError("a token's counter is 1 to 2^63 - 1")
        if len(self.recipient) != DIGEST_SIZE:
            raise UserTokenError("a token's recipient is a digest of 32 bytes")
        if not 1 <= len(self.name) <= MAX_NAME or not all("!" <= letter <= "~" for letter in self.name):
            raise UserTokenError(f"a token's name has 1 to {MAX_NAME} printable ASCII characters, and no space")
        if len(self.value) > MAX_VALUE:
            raise UserTokenError(f"a token has at most {MAX_VALUE} bytes")

    def encode(self) -> bytes:
        """The container's plaintext."""
        return encode_tlv(
            (
                (_COUNTER, self.counter.to_bytes(_COUNTER_SIZE)),
                (_RECIPIENT, self.recipient),
                (_NAME, self.name.encode("ascii")),
                (_VALUE, self.value),
            )
        )

    @classmethod
    def decode(cls, untrusted: bytes) -> UserToken:
        """Raises UserTokenError."""
        try:
            items = decode_tlv(untrusted)
            name = dict(items).get(_NAME, b"").decode("ascii")
        except (CardFormatError, UnicodeDecodeError):
            raise UserTokenError("that is no user's token") from None
        if [tag for tag, _ in items] != [_COUNTER, _RECIPIENT, _NAME, _VALUE] or len(items[0][1]) != _COUNTER_SIZE:
            raise UserTokenError("that is no user's token")
        return cls(int.from_bytes(items[0][1]), items[1][1], name, items[3][1])
