"""EAP packets (RFC 3748, 4): codes, types and the codec. Sans-IO; the methods and state machines live elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from secfunet.errors import SecFuNetError

HEADER_LENGTH: Final = 4
"""Code, identifier and two bytes of length."""
MAX_PACKET: Final = 0xFFFF
"""The length field has 16 bits."""


class EapError(SecFuNetError):
    """Root of what can be wrong with EAP packets and the methods that they carry."""


class EapFormatError(EapError):
    """Bytes that are no EAP packet, or values that do not fit into one. A receiver discards such bytes silently (RFC 3748, 4)."""


class EapCode(IntEnum):
    """The first byte (RFC 3748, 4)."""

    REQUEST = 1
    RESPONSE = 2
    SUCCESS = 3
    FAILURE = 4


class EapType(IntEnum):
    """The types that are understood here (RFC 3748, 5; RFC 5216). Others are plain numbers."""

    IDENTITY = 1
    NOTIFICATION = 2
    NAK = 3
    TLS = 13


@dataclass(frozen=True, slots=True)
class EapPacket:
    """One packet. ``type`` is None for Success and Failure only, which have no data."""

    code: EapCode
    identifier: int
    type: int | None = None
    data: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.identifier <= 0xFF:
            raise EapFormatError("an EAP identifier has one byte")
        if self.code in (EapCode.SUCCESS, EapCode.FAILURE):
            if self.type is not None or self.data:
                raise EapFormatError("EAP Success and Failure carry nothing")
        elif self.type is None or not 0 < self.type <= 0xFF:
            raise EapFormatError("an EAP type is one byte, and not 0")
        if len(self.data) > MAX_PACKET - HEADER_LENGTH - 1:
            raise EapFormatError("an EAP packet has at most 65535 bytes")

    def encode(self) -> bytes:
        """The bytes of the packet (RFC 3748, 4.1 and 4.2)."""
        body = b"" if self.type is None else bytes((self.type,)) + self.data
        return bytes((self.code, self.identifier)) + (HEADER_LENGTH + len(body)).to_bytes(2) + body

    @classmethod
    def decode(cls, untrusted: bytes) -> EapPacket:
        """Bytes past the length field's end are padding of the lower layer and ignored (RFC 3748, 4.1). Raises EapFormatError."""
        if len(untrusted) < HEADER_LENGTH:
            raise EapFormatError("an EAP packet has at least 4 bytes")
        length = int.from_bytes(untrusted[2:4])
        if not HEADER_LENGTH <= length <= len(untrusted):
            raise EapFormatError("the EAP length does not fit the packet")
        try:
            code = EapCode(untrusted[0])
        except ValueError:
            raise EapFormatError("unknown EAP code") from None
        if code in (EapCode.SUCCESS, EapCode.FAILURE):
            if length != HEADER_LENGTH:
                raise EapFormatError("EAP Success and Failure have 4 bytes")
            return cls(code, untrusted[1])
        if length == HEADER_LENGTH:
            raise EapFormatError("an EAP request or response has a type")
        return cls(code, untrusted[1], untrusted[4], bytes(untrusted[5:length]))
