"""The profile of an identity, BER (draft-urien-eap-smartcard, Get-Profile-Data).

``SEQUENCE { OCTET STRING EAP-ID, INTEGER EAP type, INTEGER version, SEQUENCE { [1] subscriber's certificates, [2] root certificates }
}``. The draft's [0] (SSIDs) and [3] (files) are neither written nor refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from secfunet.card.ber import decode_elements, encode_element
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
            credentials += encode_element(_SUBSCRIBER, b"".join(self.certificates))
        if self.authorities:
            credentials += encode_element(_ROOTS, b"".join(self.authorities))
        return encode_element(
            _SEQUENCE,
            encode_element(_OCTETS, self.eap_id)
            + encode_element(_INTEGER, bytes((self.eap_type,)))
            + encode_element(_INTEGER, bytes((self.version,)))
            + encode_element(_SEQUENCE, credentials),
        )

    @classmethod
    def decode(cls, untrusted: bytes) -> CardProfile:
        """Raises CardFormatError. The certificates are cut apart, not parsed."""
        outer = decode_elements(untrusted)
        if len(outer) != 1 or outer[0][0] != _SEQUENCE:
            raise CardFormatError("a profile is one sequence")
        fields = decode_elements(outer[0][1])
        if [tag for tag, _, _ in fields] != [_OCTETS, _INTEGER, _INTEGER, _SEQUENCE]:
            raise CardFormatError("a profile has four fields")
        certificates: dict[int, tuple[bytes, ...]] = {}
        for tag, value, _ in decode_elements(fields[3][1]):
            if tag not in _KNOWN_CREDENTIALS or tag in certificates:
                raise CardFormatError("unknown or repeated credential")
            certificates[tag] = tuple(whole for _, _, whole in decode_elements(value))
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
