"""Results of a bound identity: for one hypervisor only, in containers that this card builds and signs with the identity's own key.

So whoever carries them, the service provider first of all, can neither read them nor make others (docs/protocols.md, "Bound cards").
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from secfunet.card.binding import Binding, SealedAnswer, SealRequest
from secfunet.card.errors import CardFormatError
from secfunet.card.instructions import KeyOperation, PersonalisationTag
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import thumbprint
from secure_element.errors import CommandRefusedError, Sw
from secure_element.identities import MAX_CERTIFICATE, Identities, items_of, single
from secure_element.keys import KeyPair
from secure_element.store import IdentityRecord, RandBytes
from secure_element.work import Work

MIN_RECIPIENT_BITS: Final = 2048

_SIGNATURE_SCHEMES: Final = {
    ContainerProfile.OAEP_PSS_SHA256: operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256,
    ContainerProfile.PKCS1_V1_5: operation_pb2.SIGNATURE_SCHEME_RSASSA_PKCS1_V1_5_SHA256,
}
_OPERATIONS: Final[dict[int, Callable[[KeyPair, int, bytes], bytes]]] = {
    KeyOperation.SIGN: KeyPair.sign,
    KeyOperation.DECRYPT: KeyPair.decrypt,
    KeyOperation.ENCRYPT: KeyPair.encrypt,
}


class Bindings:
    """Binds identities, and seals for those that are bound; ``work`` counts what it does with their keys. ``monotonic`` bounds the time
    that a content key serves.
    """

    def __init__(
        self,
        identities: Identities,
        randbytes: RandBytes,
        work: Work,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identities = identities
        self._randbytes = randbytes
        self._work = work
        self._monotonic = monotonic
        self._sealers: dict[IdentityRecord, ContainerSealer] = {}

    def forget(self) -> None:
        """Drops the content keys that are in use."""
        self._sealers.clear()

    def bind(self, untrusted_profile: int, untrusted: bytes) -> str:
        """{01 name, 06 certificate of the hypervisor}; without 06 the identity is bound no longer. Returns the name.

        Raises CommandRefusedError: 6A88, 6985 (incomplete), 6A81 (a key that is not RSA), 6A80, 6B00 (profile).
        """
        try:
            profile = ContainerProfile(untrusted_profile)
        except ValueError:
            raise CommandRefusedError(Sw.WRONG_P1_P2) from None
        items = items_of(untrusted)
        has_recipient = len(items) > 1
        wanted = {PersonalisationTag.NAME} | ({PersonalisationTag.HYPERVISOR} if has_recipient else set())
        values = single(items, wanted)
        record = self._identities.find(values[PersonalisationTag.NAME])
        if record is None:
            raise CommandRefusedError(Sw.NO_IDENTITY)
        if not record.is_complete:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        if not record.algorithm.is_rsa:
            raise CommandRefusedError(Sw.NOT_SUPPORTED)
        recipient = values.get(PersonalisationTag.HYPERVISOR, b"")
        if has_recipient:
            _recipient_key(recipient)
        self.forget()
        self._identities.replace(record, replace(record, recipient=recipient, profile=int(profile) if recipient else 0))
        return record.name

    @staticmethod
    def binding_of(record: IdentityRecord) -> Binding | None:
        """Which hypervisor the identity is bound to."""
        return Binding(record.profile, thumbprint(record.recipient)) if record.recipient else None

    def seal(self, record: IdentityRecord, untrusted: bytes) -> bytes:
        """Does the operations, and packs the outputs of those that succeed into one container.

        Raises CommandRefusedError: 6985 if the identity is not bound, 6A80 for a request that is none.
        """
        if not record.recipient:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        try:
            request = SealRequest.decode(untrusted)
        except CardFormatError:
            raise CommandRefusedError(Sw.WRONG_DATA) from None
        key = self._identities.key_of(record)
        results: list[operation_pb2.Result] = []
        failures: list[tuple[bytes, int]] = []
        for one in request.operations:
            operation = _OPERATIONS.get(one.operation)
            try:
                if operation is None:
                    raise CommandRefusedError(Sw.NOT_SUPPORTED)
                output = operation(key, one.scheme, one.payload)
            except CommandRefusedError as error:
                failures.append((one.request_id, error.sw))
                continue
            self._work.private_operations += one.operation != KeyOperation.ENCRYPT
            digest = hashlib.sha256(bytes((one.kind, one.scheme)) + one.payload).digest()
            results.append(operation_pb2.Result(request_id=one.request_id, request_digest=digest, output=output))
        container = b""
        if results:
            result_set = operation_pb2.ResultSet(
                vmid=thumbprint(record.certificate),
                hvid=thumbprint(record.recipient),
                time=request.time,
                results=results,
            )
            container = self._sealer(record, key).seal(result_set.SerializeToString())
            self._work.private_operations += 1  # its trailer
        return SealedAnswer(container, tuple(failures)).encode()

    def _sealer(self, record: IdentityRecord, key: KeyPair) -> ContainerSealer:
        sealer = self._sealers.get(record)
        if sealer is None:
            profile = ContainerProfile(record.profile)
            scheme = _SIGNATURE_SCHEMES[profile]
            sealer = self._sealers[record] = ContainerSealer(
                _recipient_key(record.recipient),
                lambda signed: key.sign(scheme, hashlib.sha256(signed).digest()),
                profile,
                clock=self._monotonic,
                randbytes=self._randbytes,
            )
        return sealer


def _recipient_key(untrusted: bytes) -> rsa.RSAPublicKey:
    if len(untrusted) > MAX_CERTIFICATE:
        raise CommandRefusedError(Sw.WRONG_DATA)
    try:
        key = x509.load_der_x509_certificate(untrusted).public_key()
    except Exception:  # noqa: BLE001 - whatever the library makes of such bytes
        raise CommandRefusedError(Sw.WRONG_DATA) from None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < MIN_RECIPIENT_BITS or key.key_size % 8:
        raise CommandRefusedError(Sw.WRONG_DATA)
    return key
