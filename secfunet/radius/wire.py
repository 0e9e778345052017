"""The form of RADIUS packets (RFC 2865, 3 and 5): codes, the attributes that EAP needs, and the check that a packet is one."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from secfunet.radius.errors import RadiusFormatError

MIN_PACKET: Final = 20
MAX_PACKET: Final = 4096
"""Bytes (RFC 2865, 3)."""
MIN_SECRET: Final = 16
"""Bytes that a shared secret should have at least (RFC 2865, 3)."""
MIN_MTU: Final = 64
"""The least bytes of an EAP packet that a link is taken to carry; a Framed-MTU below it means this (RFC 2865, 5.12 has the same least)."""
MAX_EAP: Final = 3000
"""Bytes of an EAP packet, either way: it fits into a packet together with what stands around it."""
AUTHENTICATOR_SIZE: Final = 16

_CHUNK: Final = 253
_MICROSOFT: Final = 311
RECV_KEY: Final = (_MICROSOFT, 17)
SEND_KEY: Final = (_MICROSOFT, 16)
"""MS-MPPE-Recv-Key and -Send-Key (RFC 2548, 2.4), as pyrad calls them: the MSK's bytes 0–31 and 32–63 (RFC 5216, 2.3; RFC 3748, 7.10)."""


class Code(IntEnum):
    """The first byte."""

    ACCESS_REQUEST = 1
    ACCESS_ACCEPT = 2
    ACCESS_REJECT = 3
    ACCESS_CHALLENGE = 11
    STATUS_SERVER = 12


class Attribute(IntEnum):
    """Those that are looked at or made here."""

    USER_NAME = 1
    FRAMED_MTU = 12
    STATE = 24
    VENDOR_SPECIFIC = 26
    NAS_IDENTIFIER = 32
    PROXY_STATE = 33
    NAS_PORT_TYPE = 61
    EAP_MESSAGE = 79
    MESSAGE_AUTHENTICATOR = 80
    ERROR_CAUSE = 101


def split_attributes(untrusted: bytes) -> list[tuple[int, bytes]]:
    """The attributes of a packet, in their order; what is behind its length is padding. Raises RadiusFormatError."""
    attributes, fault = attributes_and_fault(untrusted)
    if fault:
        raise RadiusFormatError(fault)
    return attributes


def attributes_and_fault(untrusted: bytes) -> tuple[list[tuple[int, bytes]], str]:
    """The attributes up to one with an invalid length, and what is wrong with that; "" if every length is right.

    Raises RadiusFormatError for bytes that are not a packet at all.
    """
    if len(untrusted) < MIN_PACKET:
        raise RadiusFormatError("a packet has at least 20 bytes")
    length = int.from_bytes(untrusted[2:4])
    if not MIN_PACKET <= length <= min(MAX_PACKET, len(untrusted)):
        raise RadiusFormatError("the packet's length is not what it says")
    attributes: list[tuple[int, bytes]] = []
    position = MIN_PACKET
    while position < length:
        size = untrusted[position + 1] if position + 1 < length else 0
        if size < 2 or position + size > length:
            return attributes, "an attribute does not fit into the packet"
        attributes.append((untrusted[position], untrusted[position + 2 : position + size]))
        position += size
    return attributes, ""


def vendor_values(attributes: list[tuple[int, bytes]], name: tuple[int, int]) -> list[bytes]:
    """The values of a vendor's attribute (RFC 2865, 5.26): several of a vendor may share one; what is malformed is skipped."""
    vendor, kind = name
    found = []
    for outer, value in attributes:
        if outer != Attribute.VENDOR_SPECIFIC or value[:4] != vendor.to_bytes(4):
            continue
        position = 4
        while position + 2 <= len(value):
            size = value[position + 1]
            if size < 2 or position + size > len(value):
                break
            if value[position] == kind:
                found.append(value[position + 2 : position + size])
            position += size
    return found


def eap_chunks(eap: bytes) -> list[bytes]:
    """An EAP packet as the values of EAP-Message attributes (RFC 3579, 3.1)."""
    return [eap[start : start + _CHUNK] for start in range(0, len(eap), _CHUNK)]


def text_value(text: str) -> bytes:
    """As much of a text as fits into an attribute."""
    return text.encode()[:_CHUNK]
