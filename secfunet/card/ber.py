"""BER elements (ISO 8825-1; ISO 7816-4, 5.2.2), as profiles and security domains have them: definite lengths, tags of one or two bytes."""

from __future__ import annotations

from typing import Final, NamedTuple

from secfunet.card.errors import CardFormatError

MAX_ELEMENTS: Final = 64
_MANY_BYTES: Final = 0x1F
"""These bits of a tag's first byte are all set if a second one follows."""


class Element(NamedTuple):
    """One element; ``whole`` is it with tag and length."""

    tag: int
    value: bytes
    whole: bytes


def encode_element(tag: int, value: bytes) -> bytes:
    """Tag (at most two bytes), length as short as can be, value."""
    encoded = tag.to_bytes(2 if tag > 0xFF else 1)
    if len(value) < 128:
        return encoded + bytes((len(value),)) + value
    size = (len(value).bit_length() + 7) // 8
    return encoded + bytes((0x80 | size,)) + len(value).to_bytes(size) + value


def decode_elements(untrusted: bytes) -> list[Element]:
    """All elements in a row: at most 64, lengths of at most three bytes. Raises CardFormatError."""
    found: list[Element] = []
    position = 0
    while position < len(untrusted):
        start = position
        position += 2 if untrusted[start] & _MANY_BYTES == _MANY_BYTES else 1
        tag = int.from_bytes(untrusted[start:position])
        if position >= len(untrusted) or (tag > 0xFF and tag & 0x80):
            raise CardFormatError("an element is cut off, or its tag has too many bytes")
        length = untrusted[position]
        content = position + 1
        if length > 127:
            size = length & 0x7F
            if not 1 <= size <= 3 or content + size > len(untrusted):
                raise CardFormatError("the length of an element is out of range")
            length = int.from_bytes(untrusted[content : content + size])
            content += size
        position = content + length
        if position > len(untrusted) or len(found) == MAX_ELEMENTS:
            raise CardFormatError("an element is cut off, or there are too many")
        found.append(Element(tag, untrusted[content:position], untrusted[start:position]))
    return found
