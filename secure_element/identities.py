"""The TLS-Ids of a card: made, completed and deleted by the card's administrator, found by name, their keys kept ready in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secfunet.card.errors import CardFormatError
from secfunet.card.instructions import PersonalisationTag
from secfunet.card.parameters import KeyAlgorithm
from secfunet.card.tlv import decode_tlv
from secure_element.errors import CommandRefusedError, Sw
from secure_element.keys import KeyPair, generate_key
from secure_element.store import CardStore, IdentityRecord

MAX_IDENTITIES: Final = 16
MAX_NAME: Final = 32
MAX_EAP_ID: Final = 253
MAX_CERTIFICATE: Final = 8192
MAX_AUTHORITIES: Final = 8


class Identities:
    """What the card's store says about identities, as objects."""

    def __init__(self, store: CardStore, make_key: Callable[[KeyAlgorithm], bytes] = generate_key) -> None:
        self._store = store
        self._make_key = make_key
        self._keys: dict[bytes, KeyPair] = {}
        for record in self.records:
            self.key_of(record)

    @property
    def records(self) -> Sequence[IdentityRecord]:
        """All of them, oldest first."""
        return self._store.contents.identities

    def find(self, untrusted_name: bytes) -> IdentityRecord | None:
        """The one of exactly that name."""
        return next((record for record in self.records if record.name.encode() == untrusted_name), None)

    def key_of(self, record: IdentityRecord) -> KeyPair:
        """Its key pair, parsed once."""
        key = self._keys.get(record.private_key)
        if key is None:
            key = self._keys[record.private_key] = KeyPair(record.private_key)
        return key

    def generate(self, untrusted_algorithm: int, untrusted_name: bytes) -> None:
        """A key pair for a new name, or a new one for a name that has no certificate yet. Raises CommandRefusedError."""
        try:
            algorithm = KeyAlgorithm(untrusted_algorithm)
        except ValueError:
            raise CommandRefusedError(Sw.WRONG_P1_P2) from None
        name = _name(untrusted_name)
        before = self.find(untrusted_name)
        if before is not None and before.is_complete:
            raise CommandRefusedError(Sw.IDENTITY_EXISTS)
        others = tuple(record for record in self.records if record is not before)
        if len(others) >= MAX_IDENTITIES:
            raise CommandRefusedError(Sw.FULL)
        self._write((*others, IdentityRecord(name, algorithm, self._make_key(algorithm))))

    def request_certificate(self, untrusted: bytes) -> bytes:
        """A certificate signing request, PKCS#10 in DER."""
        items = single(items_of(untrusted), {PersonalisationTag.NAME, PersonalisationTag.SUBJECT})
        record = self._existing(items[PersonalisationTag.NAME])
        try:
            subject = items[PersonalisationTag.SUBJECT].decode()
        except UnicodeDecodeError:
            raise CommandRefusedError(Sw.WRONG_DATA) from None
        return self.key_of(record).certificate_request(subject)

    def load(self, untrusted: bytes) -> str:
        """Takes certificate and authorities; returns the name. The certificate must be for this key."""
        items = items_of(untrusted)
        authorities = tuple(value for tag, value in items if tag == PersonalisationTag.AUTHORITY)
        values = single(
            [item for item in items if item[0] != PersonalisationTag.AUTHORITY],
            {PersonalisationTag.NAME, PersonalisationTag.EAP_ID, PersonalisationTag.CERTIFICATE},
        )
        record = self._existing(values[PersonalisationTag.NAME])
        certificate = values[PersonalisationTag.CERTIFICATE]
        if not 1 <= len(authorities) <= MAX_AUTHORITIES or len(values[PersonalisationTag.EAP_ID]) > MAX_EAP_ID:
            raise CommandRefusedError(Sw.WRONG_DATA)
        parsed = _certificate(certificate)
        for authority in authorities:
            _certificate(authority)
        if _public_key(parsed) != self.key_of(record).public_key_der:
            raise CommandRefusedError(Sw.WRONG_DATA)
        complete = dataclasses.replace(
            record, eap_id=values[PersonalisationTag.EAP_ID], certificate=certificate, authorities=authorities
        )
        self.replace(record, complete)
        return record.name

    def delete(self, untrusted_name: bytes) -> str:
        """Destroys an identity and its key; returns the name."""
        record = self._existing(untrusted_name)
        self._write(tuple(other for other in self.records if other is not record))
        return record.name

    def replace(self, record: IdentityRecord, by: IdentityRecord) -> None:
        """Writes another record in the place of one."""
        self._write(tuple(by if other is record else other for other in self.records))

    def _existing(self, untrusted_name: bytes) -> IdentityRecord:
        record = self.find(untrusted_name)
        if record is None:
            raise CommandRefusedError(Sw.NO_IDENTITY)
        return record

    def _write(self, records: tuple[IdentityRecord, ...]) -> None:
        self._store.replace(dataclasses.replace(self._store.contents, identities=records))
        # A key that the store no longer has is none of memory's, either.
        kept = {record.private_key for record in records}
        self._keys = {encoded: key for encoded, key in self._keys.items() if encoded in kept}


def _name(untrusted: bytes) -> str:
    if not 1 <= len(untrusted) <= MAX_NAME or not all(0x20 < byte < 0x7F for byte in untrusted):
        raise CommandRefusedError(Sw.WRONG_DATA)
    return untrusted.decode("ascii")


def items_of(untrusted: bytes) -> list[tuple[int, bytes]]:
    """The items of a command's data. Raises CommandRefusedError."""
    try:
        return decode_tlv(untrusted)
    except CardFormatError:
        raise CommandRefusedError(Sw.WRONG_DATA) from None


def single(items: list[tuple[int, bytes]], wanted: set[PersonalisationTag]) -> dict[int, bytes]:
    """All the wanted items and no other, each once."""
    if len(items) != len(wanted) or {tag for tag, _ in items} != wanted:
        raise CommandRefusedError(Sw.WRONG_DATA)
    return dict(items)


def _certificate(untrusted: bytes) -> x509.Certificate:
    if len(untrusted) > MAX_CERTIFICATE:
        raise CommandRefusedError(Sw.WRONG_DATA)
    try:
        certificate = x509.load_der_x509_certificate(untrusted)
        _public_key(certificate)  # parsed lazily: a key that nobody can read is found here, not in a handshake
    except CommandRefusedError:
        raise
    except Exception:  # noqa: BLE001 - whatever the library makes of such bytes
        raise CommandRefusedError(Sw.WRONG_DATA) from None
    return certificate


def _public_key(certificate: x509.Certificate) -> bytes:
    try:
        return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CommandRefusedError(Sw.WRONG_DATA) from None
