"""Tag (1 byte), length (2 bytes, big endian), value: how structured data goes into and comes out of a card."""

from __future__ import annotations

from collections.abc import Iterable

from secfunet.card.errors import CardFormatError

MAX_ITEMS = 256


def encode_tlv(items: Iterable[tuple[int, bytes]]) -> bytes:
    """Concatenates the items. Raises CardFormatError for a tag over 255 or a value over 65535 bytes."""
    encoded = bytearray()
    for tag, value in items:
        if not 0 <= tag <= 0xFF or len(value) > 0xFFFF:
            raise CardFormatError(f"item with tag {tag} cannot be encoded")
        encoded += bytes((tag,)) + len(value).to_bytes(2) + value
    return bytes(encoded)


def decode_tlv(untrusted: bytes) -> list[tuple[int, bytes]]:
    """Parses all of ``untrusted`` (at most 256 items). Raises CardFormatError."""
    items: list[tuple[int, bytes]] = []
    position = 0
    while position < len(untrusted):
        if len(items) == MAX_ITEMS:
            raise CardFormatError("too many items")
        start = position + 3
        length = int.from_bytes(untrusted[position + 1 : start])
        if start > len(untrusted) or start + length > len(untrusted):
            raise CardFormatError("an item is cut off")
        items.append((untrusted[position], untrusted[start : start + length]))
        position = start + length
    return items
