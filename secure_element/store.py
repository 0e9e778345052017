"""What a card keeps: PIN, identities and their private keys, its administrator's keys, in one encrypted file that a crash leaves whole.

The file is ``header ‖ AES-256-GCM ciphertext``; the header (authenticated with it) is ``"SFNSE" ‖ version 02 ‖ kind ‖ key salt (16) ‖
write salt (32)``. Kind 01: the store key is a random secret of at least 32 bytes; kind 02: it is a passphrase, stretched by scrypt
(N=2^17, r=8, p=1) over the key salt. Every write has a key of its own: HKDF-SHA256 of the store key, with the write salt as salt and
``"secure element store"`` as info; so the nonce is zero and there is no bound on the number of writes.

**Known limit:** whoever can replace the file can put an older one in its place (old PIN, old retry counter, deleted identity). Only
hardware with a monotonic counter could tell; the folder must be writable by the card's own user alone.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secfunet.card.parameters import KeyAlgorithm
from secfunet.scp03 import KeySet, Scp03FormatError
from secfunet.service.files import open_private, remove_unfinished, write_atomically
from secure_element.errors import StoreError, StoreExistsError

MAGIC: Final = b"SFNSE\x02"
KEY_SALT_SIZE: Final = 16
WRITE_SALT_SIZE: Final = 32
HEADER_SIZE: Final = len(MAGIC) + 1 + KEY_SALT_SIZE + WRITE_SALT_SIZE
MAX_FILE_SIZE: Final = 4 * 1024 * 1024
MIN_SECRET_SIZE: Final = 32
KEY_DATA_SIZE: Final = 10

RandBytes = Callable[[int], bytes]


@dataclass(frozen=True)
class StoreSecret:
    """What opens a store: a random secret (at least 32 bytes), or a passphrase that a person types."""

    secret: bytes = field(repr=False)
    is_passphrase: bool = False

    def __post_init__(self) -> None:
        if not self.is_passphrase and len(self.secret) < MIN_SECRET_SIZE:
            raise StoreError(f"a store key has at least {MIN_SECRET_SIZE} bytes")
        if not self.secret:
            raise StoreError("an empty passphrase opens no store")

    @property
    def kind(self) -> int:
        """The header's byte for it."""
        return 2 if self.is_passphrase else 1

    def derive(self, key_salt: bytes) -> bytes:
        """The store key. Stretching a passphrase takes about half a second and 128 MB."""
        if not self.is_passphrase:
            return self.secret
        return hashlib.scrypt(self.secret, salt=key_salt, n=2**17, r=8, p=1, dklen=32, maxmem=256 * 1024 * 1024)


@dataclass(frozen=True)
class PinRecord:
    """A PIN as a salted slow hash, and its retry counter."""

    salt: bytes = field(repr=False)
    verifier: bytes = field(repr=False)
    attempts: int
    limit: int


@dataclass(frozen=True)
class TokenRecord:
    """A token of the card's user, and the counter that it came with."""

    name: str
    counter: int
    value: bytes = field(repr=False)


@dataclass(frozen=True)
class TokenAuthorityRecord:
    """Whose tokens the card takes: a public key (SubjectPublicKeyInfo, DER), and the counter of the last token that it took.

    One that is not trusted any more is kept for its counter.
    """

    public_key: bytes
    counter: int
    is_trusted: bool


@dataclass(frozen=True)
class IdentityRecord:
    """A TLS-Id. Without a certificate it is a key pair that waits for one. ``private_key`` is PKCS#8, DER."""

    name: str
    algorithm: KeyAlgorithm
    private_key: bytes = field(repr=False)
    eap_id: bytes = b""
    certificate: bytes = b""
    authorities: tuple[bytes, ...] = ()
    recipient: bytes = b""  # certificate of the hypervisor that it is bound to; empty: it is not
    profile: int = 0  # of its containers, if it is bound
    tokens: tuple[TokenRecord, ...] = ()  # oldest first

    @property
    def is_complete(self) -> bool:
        """Whether it has its certificate."""
        return bool(self.certificate)


@dataclass(frozen=True)
class DomainRecord:
    """What the issuer security domain keeps. ``key_sets`` by version, the newest last; ``key_data`` (10 bytes) names the card to its
    administrators; ``data`` are elements that STORE DATA put there, by tag.
    """

    key_data: bytes = bytes(KEY_DATA_SIZE)
    key_sets: Mapping[int, KeySet] = field(default_factory=dict)
    data: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreContents:
    """All that the card keeps, as one immutable value."""

    pin: PinRecord
    identities: tuple[IdentityRecord, ...] = ()
    domain: DomainRecord = field(default_factory=DomainRecord)
    token_authorities: tuple[TokenAuthorityRecord, ...] = ()

    def encode(self) -> bytes:
        """JSON, binary values in base64."""
        document = {
            "pin": {
                "salt": _text(self.pin.salt),
                "verifier": _text(self.pin.verifier),
                "attempts": self.pin.attempts,
                "limit": self.pin.limit,
            },
            "domain": {
                "key_data": _text(self.domain.key_data),
                "key_sets": [[version, _text(keys.joined())] for version, keys in self.domain.key_sets.items()],
                "data": [[tag, _text(value)] for tag, value in self.domain.data.items()],
            },
            "identities": [
                {
                    "name": identity.name,
                    "algorithm": identity.algorithm.name,
                    "private_key": _text(identity.private_key),
                    "eap_id": _text(identity.eap_id),
                    "certificate": _text(identity.certificate),
                    "authorities": [_text(authority) for authority in identity.authorities],
                    "recipient": _text(identity.recipient),
                    "profile": identity.profile,
                    "tokens": [[token.name, token.counter, _text(token.value)] for token in identity.tokens],
                }
                for identity in self.identities
            ],
            "token_authorities": [
                [_text(authority.public_key), authority.counter, authority.is_trusted]
                for authority in self.token_authorities
            ],
        }
        return json.dumps(document).encode()

    @classmethod
    def decode(cls, content: bytes) -> StoreContents:
        """Raises StoreError; what is parsed here has been authenticated, so that would be a fault of the program that wrote it."""
        try:
            document = json.loads(content)
            return cls(
                pin=_pin(document["pin"]),
                domain=_domain(document["domain"]),
                identities=tuple(_identity(identity) for identity in document["identities"]),
                token_authorities=tuple(
                    TokenAuthorityRecord(_bytes(key), int(counter), bool(is_trusted))
                    for key, counter, is_trusted in document.get("token_authorities", ())
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError, Scp03FormatError) as error:
            # Only the kind of the fault: its text may hold a piece of what is kept here.
            raise StoreError(f"the store's content is not understood ({type(error).__name__})") from None


class CardStore:
    """The open store of a running card; no second process can open it meanwhile."""

    def __init__(
        self,
        path: Path,
        kind: int,
        key: bytes,
        key_salt: bytes,
        contents: StoreContents,
        lock: int,
        randbytes: RandBytes,
    ) -> None:
        self._path = path
        self._kind = kind
        self._key = key
        self._key_salt = key_salt
        self._contents = contents
        self._lock = lock
        self._randbytes = randbytes

    @classmethod
    def create(
        cls, path: Path, secret: StoreSecret, contents: StoreContents, randbytes: RandBytes = os.urandom
    ) -> CardStore:
        """Makes a new store. Raises StoreError if there is one already."""
        lock = _lock(path)
        try:
            if path.exists():
                raise StoreExistsError(f"{path} exists already: its keys would be lost")
            key_salt = randbytes(KEY_SALT_SIZE)
            store = cls(path, secret.kind, secret.derive(key_salt), key_salt, contents, lock, randbytes)
            store.replace(contents)
        except BaseException:
            os.close(lock)
            raise
        return store

    @classmethod
    def open(cls, path: Path, secret: StoreSecret, randbytes: RandBytes = os.urandom) -> CardStore:
        """Opens a store. Raises StoreError."""
        if not path.exists():
            raise StoreError(f"{path} does not exist: make it with 'secure-element init'")
        lock = _lock(path)
        try:
            remove_unfinished(path)
            kind, key, key_salt, contents = _open(path, secret)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, kind, key, key_salt, contents, lock, randbytes)

    @property
    def contents(self) -> StoreContents:
        """What was last written."""
        return self._contents

    def replace(self, contents: StoreContents) -> None:
        """Writes the new contents; when this returns they are durable. Raises OSError, and then the old ones still hold."""
        write_salt = self._randbytes(WRITE_SALT_SIZE)
        header = MAGIC + bytes((self._kind,)) + self._key_salt + write_salt
        sealed = AESGCM(_write_key(self._key, write_salt)).encrypt(bytes(12), contents.encode(), header)
        write_atomically(self._path, header + sealed)
        self._contents = contents

    def close(self) -> None:
        """Lets another process open the store."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _open(path: Path, secret: StoreSecret) -> tuple[int, bytes, bytes, StoreContents]:
    with path.open("rb") as file:
        content = file.read(MAX_FILE_SIZE + 1)
    if len(content) > MAX_FILE_SIZE or len(content) < HEADER_SIZE or not content.startswith(MAGIC):
        raise StoreError(f"{path} is no store of this version")
    header, sealed = content[:HEADER_SIZE], content[HEADER_SIZE:]
    kind = header[len(MAGIC)]
    if kind != secret.kind:
        raise StoreError(f"{path} is opened by a {'passphrase' if kind == 2 else 'key'}, see store_key in the settings")
    key_salt = header[len(MAGIC) + 1 : len(MAGIC) + 1 + KEY_SALT_SIZE]
    key = secret.derive(key_salt)
    try:
        plain = AESGCM(_write_key(key, header[-WRITE_SALT_SIZE:])).decrypt(bytes(12), sealed, header)
    except InvalidTag:
        raise StoreError(f"{path} is damaged, or sealed with another key") from None
    return kind, key, key_salt, StoreContents.decode(plain)


def _lock(path: Path) -> int:
    descriptor = open_private(path.with_name(path.name + ".lock"))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(f"{path} is in use by another process") from None
    return descriptor


def _write_key(key: bytes, salt: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, b"secure element store").derive(key)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("no base64") from None


def _pin(pin: Any) -> PinRecord:
    return PinRecord(_bytes(pin["salt"]), _bytes(pin["verifier"]), int(pin["attempts"]), int(pin["limit"]))


def _domain(domain: Any) -> DomainRecord:
    return DomainRecord(
        key_data=_bytes(domain["key_data"]),
        key_sets={int(version): KeySet.split(_bytes(keys)) for version, keys in domain["key_sets"]},
        data={int(tag): _bytes(value) for tag, value in domain["data"]},
    )


def _identity(identity: Any) -> IdentityRecord:
    return IdentityRecord(
        name=str(identity["name"]),
        algorithm=KeyAlgorithm[identity["algorithm"]],
        private_key=_bytes(identity["private_key"]),
        eap_id=_bytes(identity["eap_id"]),
        certificate=_bytes(identity["certificate"]),
        authorities=tuple(_bytes(authority) for authority in identity["authorities"]),
        recipient=_bytes(identity.get("recipient", "")),
        profile=int(identity.get("profile", 0)),
        tokens=tuple(
            TokenRecord(str(name), int(counter), _bytes(value)) for name, counter, value in identity.get("tokens", ())
        ),
    )
