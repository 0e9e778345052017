r"""Containers: how a result travels from a grid to the one hypervisor for which it was made, past everybody else.

Layout, all sizes in bytes (the source is section 6 of the SecFuNet paper; there are no length fields, the sizes follow from the
two keys):

    header    k           the content key (32 bytes, AES-256), encrypted to the recipient's RSA key; k: size of the recipient's modulus
    body      16 + 16 n   a random IV (16), then the plaintext under AES-256-CBC with PKCS#7 padding; n is at least 1
    trailer   m           the authority's RSA signature of header ‖ body; m: size of the authority's modulus

    profile                    header                                        trailer
    1 (OAEP_PSS_SHA256)        RSAES-OAEP, SHA-256, MGF1-SHA-256, no label   RSASSA-PSS, SHA-256, MGF1-SHA-256, salt of 32 bytes
    2 (PKCS1_V1_5)             RSAES-PKCS1-v1_5                              RSASSA-PKCS1-v1_5, SHA-256

(RFC 8017 for all four; profile 2 is for cards that have no more.) With OpenSSL's command line, profile 1, k = m = 256, a container
in the file c, the recipient's private key in r.pem and the authority's public key in a.pem:

    size=$(stat -c %s c); head -c $((size - 256)) c > signed; tail -c 256 c > trailer
    openssl dgst -sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32 \
        -verify a.pem -signature trailer signed
    head -c 256 signed | openssl pkeyutl -decrypt -inkey r.pem \
        -pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 > key
    tail -c +257 signed | head -c 16 > iv; tail -c +273 signed > ciphertext
    openssl enc -d -aes-256-cbc \
        -K "$(od -An -v -tx1 key | tr -d ' \n')" \
        -iv "$(od -An -v -tx1 iv | tr -d ' \n')" -in ciphertext

Verify before decrypt, always: only a VerifiedContainer can be opened. Whatever is wrong, the error is the same. One content key
may serve many containers, each with its own IV, within a bound on count and time (ContainerSealer): the recipient's card
unwraps once a key, not once a container. Freshness is the plaintext's matter: it names request, VM, hypervisor, operation and
time (``secfunet.operation.check_result``).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from secfunet.errors import SecFuNetError

CONTENT_KEY_SIZE: Final = 32
BLOCK: Final = 16
MAX_PLAINTEXT: Final = 2**20
"""Bytes of the longest plaintext."""


class ContainerError(SecFuNetError):
    """The container is refused. One error and one text for every cause: what exactly is wrong would help only whoever forged it."""

    def __init__(self) -> None:
        super().__init__("the container is refused")


ProfileName = Literal["oaep-pss-sha256", "pkcs1-v1_5"]
"""How settings name a profile; the grid, the middleware and the agents of its VMs must have the same."""


class ContainerProfile(IntEnum):
    """Which paddings header and trailer have; the number travels in the unwrap command of a card."""

    OAEP_PSS_SHA256 = 1
    PKCS1_V1_5 = 2

    @classmethod
    def named(cls, name: ProfileName) -> ContainerProfile:
        """The profile of that name in settings."""
        return cls.PKCS1_V1_5 if name == "pkcs1-v1_5" else cls.OAEP_PSS_SHA256


def encryption_padding(profile: ContainerProfile) -> padding.AsymmetricPadding:
    """The padding of the header."""
    if profile is ContainerProfile.PKCS1_V1_5:
        return padding.PKCS1v15()
    return padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)


def signature_padding(profile: ContainerProfile) -> padding.AsymmetricPadding:
    """The padding of the trailer; the hash is SHA-256."""
    if profile is ContainerProfile.PKCS1_V1_5:
        return padding.PKCS1v15()
    return padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)


def modulus_size(key: rsa.RSAPublicKey) -> int:
    """Bytes of the key's modulus, and so of a header or a trailer made with it."""
    return (key.key_size + 7) // 8


@dataclass
class _ContentKey:
    """A content key in use, and what is left of its bounds."""

    key: bytes = field(repr=False)
    header: bytes
    born: float
    containers: int = 0


class ContainerSealer:
    """Makes containers for one recipient. Threads may share it; the signature, which is the work, is made outside its lock.

    ``sign`` is the authority's private key, or a function that signs the bytes that it is given as the profile's trailer wants.
    A content key serves at most ``max_containers`` containers and ``max_age`` seconds of ``clock``, which only ever goes
    forward (it is no time of day).
    """

    def __init__(
        self,
        recipient: rsa.RSAPublicKey,
        sign: rsa.RSAPrivateKey | Callable[[bytes], bytes],
        profile: ContainerProfile = ContainerProfile.OAEP_PSS_SHA256,
        *,
        max_containers: int = 1000,
        max_age: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        randbytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        if max_containers < 1 or max_age <= 0:
            raise ValueError("a content key serves at least one container")
        self._recipient = recipient
        self._sign = _signer(sign, profile) if isinstance(sign, rsa.RSAPrivateKey) else sign
        self._profile = profile
        self._max_containers = max_containers
        self._max_age = max_age
        self._clock = clock
        self._randbytes = randbytes
        self._lock = threading.Lock()
        self._current: _ContentKey | None = None

    def seal(self, plaintext: bytes) -> bytes:
        """A container around ``plaintext`` (at most MAX_PLAINTEXT bytes; a longer one is a ValueError)."""
        if len(plaintext) > MAX_PLAINTEXT:
            raise ValueError(f"a container holds at most {MAX_PLAINTEXT} bytes")
        key, header = self._content_key()
        iv = self._randbytes(BLOCK)
        padder = PKCS7(8 * BLOCK).padder()
        encryptor = Cipher(algorithms.AES256(key), modes.CBC(iv)).encryptor()
        ciphertext = encryptor.update(padder.update(plaintext) + padder.finalize()) + encryptor.finalize()
        signed = header + iv + ciphertext
        return signed + self._sign(signed)

    def forget(self) -> None:
        """Drops the content key: the next container has a new one."""
        with self._lock:
            self._current = None

    def _content_key(self) -> tuple[bytes, bytes]:
        with self._lock:
            now = self._clock()
            current = self._current
            if (
                current is None
                or current.containers >= self._max_containers
                or not 0 <= now - current.born < self._max_age
            ):
                key = self._randbytes(CONTENT_KEY_SIZE)
                header = self._recipient.encrypt(key, encryption_padding(self._profile))
                current = self._current = _ContentKey(key, header, now)
            current.containers += 1
            return current.key, current.header


def _signer(key: rsa.RSAPrivateKey, profile: ContainerProfile) -> Callable[[bytes], bytes]:
    how = signature_padding(profile)
    return lambda message: key.sign(message, how, hashes.SHA256())


@dataclass(frozen=True)
class VerifiedContainer:
    """A container whose trailer was verified: header and body are the authority's words."""

    header: bytes
    body: bytes = field(repr=False)

    def open(self, content_key: bytes) -> bytes:
        """The plaintext. Raises ContainerError."""
        if len(content_key) != CONTENT_KEY_SIZE:
            raise ContainerError
        unpadder = PKCS7(8 * BLOCK).unpadder()
        try:
            decryptor = Cipher(algorithms.AES256(content_key), modes.CBC(self.body[:BLOCK])).decryptor()
            padded = decryptor.update(self.body[BLOCK:]) + decryptor.finalize()
            return unpadder.update(padded) + unpadder.finalize()
        except ValueError:
            raise ContainerError from None


def verify_container(
    untrusted: bytes,
    authority: rsa.RSAPublicKey,
    header_size: int,
    profile: ContainerProfile = ContainerProfile.OAEP_PSS_SHA256,
) -> VerifiedContainer:
    """Verifies the trailer; nothing is decrypted. ``header_size`` is the size of the recipient's modulus, bytes.

    Raises ContainerError.
    """
    trailer_size = modulus_size(authority)
    body_size = len(untrusted) - header_size - trailer_size
    if body_size < 2 * BLOCK or body_size % BLOCK or body_size > MAX_PLAINTEXT + 2 * BLOCK:
        raise ContainerError
    signed, trailer = untrusted[:-trailer_size], untrusted[-trailer_size:]
    try:
        authority.verify(trailer, signed, signature_padding(profile), hashes.SHA256())
    except InvalidSignature:
        raise ContainerError from None
    return VerifiedContainer(header=signed[:header_size], body=signed[header_size:])


def header_of(untrusted: bytes, header_size: int) -> bytes:
    """The header of a container that has not been verified: only a name for its content key, under which a cache may have it.

    Raises ContainerError if the container is too short to have a body.
    """
    if len(untrusted) < header_size + 2 * BLOCK or header_size < 1:
        raise ContainerError
    return untrusted[:header_size]


def unwrap_content_key(
    recipient: rsa.RSAPrivateKey, header: bytes, profile: ContainerProfile = ContainerProfile.OAEP_PSS_SHA256
) -> bytes:
    """What the recipient's card does with the header of a verified container: the 32-byte content key. Raises ContainerError."""
    try:
        key = recipient.decrypt(header, encryption_padding(profile))
    except ValueError:
        raise ContainerError from None
    if len(key) != CONTENT_KEY_SIZE:
        raise ContainerError
    return key
