"""What is said to and by a bound card: to whom it is bound, what it is to do and seal, and what came of it (docs/protocols.md)."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Final

from secfunet.card.errors import CardFormatError
from secfunet.card.instructions import KeyOperation
from secfunet.card.tlv import decode_tlv, encode_tlv

SEALED_MAX: Final = 64
"""Operations that one command seals."""
REQUEST_ID_SIZE: Final = 16

_TIME, _OPERATION = 1, 2
_CONTAINER, _FAILURE = 1, 2
_HVID_SIZE: Final = 32
_KINDS: Final = {KeyOperation.SIGN: 1, KeyOperation.DECRYPT: 2, KeyOperation.ENCRYPT: 3}
_MAX_TIME: Final = 2**53


@dataclass(frozen=True)
class Binding:
    """To whom an identity's results go: profile of its containers, and HVID (thumbprint, base64url)."""

    profile: int
    hvid: str

    def encode(self) -> bytes:
        """profile (1) ‖ SHA-256 of the hypervisor's certificate (32)."""
        return bytes((self.profile,)) + base64.urlsafe_b64decode(self.hvid + "=")

    @classmethod
    def decode(cls, untrusted: bytes) -> Binding | None:
        """None: nothing, the identity is not bound. Raises CardFormatError."""
        if not untrusted:
            return None
        if len(untrusted) != 1 + _HVID_SIZE:
            raise CardFormatError("a binding is a profile and a thumbprint")
        return cls(untrusted[0], base64.urlsafe_b64encode(untrusted[1:]).rstrip(b"=").decode("ascii"))


@dataclass(frozen=True)
class SealedOperation:
    """One operation with the key (secfunet.card.client.KeyRequest), and the request that it answers."""

    operation: int
    scheme: int
    request_id: bytes
    payload: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.operation not in _KINDS or not 0 <= self.scheme <= 0xFF or len(self.request_id) != REQUEST_ID_SIZE:
            raise CardFormatError("an operation has a kind, a scheme and a request id of 16 bytes")

    @property
    def kind(self) -> int:
        """01 sign, 02 decrypt, 03 encrypt: as in the digest of a request (secfunet.operation)."""
        return _KINDS[KeyOperation(self.operation)]


@dataclass(frozen=True)
class SealRequest:
    """Operations whose outputs are to travel in one container. ``time``: UTC seconds, for the card has no clock."""

    time: int
    operations: tuple[SealedOperation, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.time < _MAX_TIME or not 1 <= len(self.operations) <= SEALED_MAX:
            raise CardFormatError(f"a time, and 1 to {SEALED_MAX} operations")
        if len({one.request_id for one in self.operations}) != len(self.operations):
            raise CardFormatError("a request id stands twice")

    def encode(self) -> bytes:
        """Items: 01 time (8), 02 kind (1) ‖ scheme (1) ‖ request id (16) ‖ payload, each."""
        return encode_tlv(
            (
                (_TIME, self.time.to_bytes(8)),
                *(
                    (_OPERATION, bytes((one.kind, one.scheme)) + one.request_id + one.payload)
                    for one in self.operations
                ),
            )
        )

    @classmethod
    def decode(cls, untrusted: bytes) -> SealRequest:
        """Raises CardFormatError."""
        items = decode_tlv(untrusted)
        if not items or items[0][0] != _TIME or len(items[0][1]) != 8 or any(tag != _OPERATION for tag, _ in items[1:]):
            raise CardFormatError("a time, then operations")
        operations = []
        by_kind = {kind: operation for operation, kind in _KINDS.items()}
        for _, value in items[1:]:
            head = 2 + REQUEST_ID_SIZE
            if len(value) < head or value[0] not in by_kind:
                raise CardFormatError("an operation has a kind, a scheme and a request id of 16 bytes")
            operations.append(SealedOperation(by_kind[value[0]], value[1], value[2:head], value[head:]))
        return cls(int.from_bytes(items[0][1]), tuple(operations))


@dataclass(frozen=True)
class SealedAnswer:
    """A container around the outputs (empty if there is none), and the operations that failed: request id and status word."""

    container: bytes = field(repr=False)
    failures: tuple[tuple[bytes, int], ...] = ()

    def encode(self) -> bytes:
        """Items: 01 container, if there is one; 02 request id (16) ‖ status word (2), each."""
        items = [(_CONTAINER, self.container)] if self.container else []
        return encode_tlv([*items, *((_FAILURE, request_id + sw.to_bytes(2)) for request_id, sw in self.failures)])

    @classmethod
    def decode(cls, untrusted: bytes) -> SealedAnswer:
        """Raises CardFormatError."""
        container, failures = b"", []
        for index, (tag, value) in enumerate(decode_tlv(untrusted)):
            if tag == _CONTAINER and index == 0 and value:
                container = value
            elif tag == _FAILURE and len(value) == REQUEST_ID_SIZE + 2:
                failures.append((value[:REQUEST_ID_SIZE], int.from_bytes(value[REQUEST_ID_SIZE:])))
            else:
                raise CardFormatError("a container, then failures")
        return cls(container, tuple(failures))
