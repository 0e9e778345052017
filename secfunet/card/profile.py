"""The profile of an identity, BER (draft-urien-eap-smartcard, Get-Profile-Data).

``SEQUENCE { OCTET STRING EAP-ID, INTEGER EAP type, INTEGER version, SEQUENCE { [1] subscriber's certificates, [2] root certificates }
}``. The draft's [0] (SSIDs) and [3] (files) are neither written nor refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from secfunet.card.errors import CardFormatError

EAP_TLS: Final = 13
_SEQUENCE, _INTEGER, _OCTETS, _SUBSCRIBER, _ROOTS = 0x30, 0x02, 0x04, 0xA1, 0xA2
_KNOWN_CREDENTIALS: Final = frozenset((0xA0, _SUBSCRIBER, _ROOTS, 0xA3))


@dataclass(frozen=True)
class CardProfile:
    """EAP-ID, EAP type (13: EAP-TLS), version, and certificates in DER."""

    eap_id: bytes
    certificates: tuple[bytes, ...] = ()
    authorities: tuple[bytes, ...] = ()
    eap_type: int = EAP_TLS
    version: int = 1

    def encode(self) -> bytes:
        """Definite lengths, as short as can be."""
        credentials = b""
        if self.certificates:
            credentials += _element(_SUBSCRIBER, b"".join(self.certificates))
        if self.authorities:
            credentials += _element(_ROOTS, b"".join(self.authorities))
        return _element(
            _SEQUENCE,
            _element(_OCTETS, self.eap_id)
            + _element(_INTEGER, bytes((self.eap_type,)))
            + _element(_INTEGER, bytes((self.version,)))
            + _element(_SEQUENCE, credentials),
        )

    @classmethod
    def decode(cls, untrusted: bytes) -> CardProfile:
        """Raises CardFormatError. The certificates are cut apart, not parsed."""
        outer = _elements(untrusted)
        if len(outer) != 1 or outer[0][0] != _SEQUENCE:
            raise CardFormatError("a profile is one sequence")
        fields = _elements(outer[0][1])
        if [tag for tag, _, _ in fields] != [_OCTETS, _INTEGER, _INTEGER, _SEQUENCE]:
            raise CardFormatError("a profile has four fields")
        certificates: dict[int, tuple[bytes, ...]] = {}
        for tag, value, _ in _elements(fields[3][1]):
            if tag not in _KNOWN_CREDENTIALS or tag in certificates:
                raise CardFormatError("unknown or repeated credential")
            certificates[tag] = tuple(whole for _, _, whole in _elements(value))
        return cls(
            eap_id=fields[0][1],
            certificates=certificates.get(_SUBSCRIBER, ()),
            authorities=certificates.get(_ROOTS, ()),
            eap_type=_small(fields[1][1]),
            version=_small(fields[2][1]),
        )


def _small(untrusted: bytes) -> int:
    if len(untrusted) != 1 or untrusted[0] > 127:
        raise CardFormatError("a number in a profile is one byte")
    return untrusted[0]


def _element(tag: int, value: bytes) -> bytes:
    if len(value) < 128:
        return bytes((tag, len(value))) + value
    size = (len(value).bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + len(value).to_bytes(size) + value


def _elements(untrusted: bytes) -> list[tuple[int, bytes, bytes]]:
    """Tag, value, and the whole element, of each element in turn (one-byte tags, definite lengths up to three bytes)."""
    found: list[tuple[int, bytes, bytes]] = []
    position = 0
    while position < len(untrusted):
        start, content = position, position + 2
        if content > len(untrusted):
            raise CardFormatError("an element is cut off")
        length = untrusted[position + 1]
        if length > 127:
            size = length & 0x7F
            if not 1 <= size <= 3 or content + size > len(untrusted):
                raise CardFormatError("the length of an element is out of range")
            length = int.from_bytes(untrusted[content : content + size])
            content += size
        position = content + length
        if position > len(untrusted) or len(found) == 64:
            raise CardFormatError("an element is cut off, or there are too many")
        found.append((untrusted[start], untrusted[content:position], untrusted[start:position]))
    return found
