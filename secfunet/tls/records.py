"""TLS records: header codec, bounds, and the buffer that cuts a byte stream into records (RFC 8446, 5; RFC 5246, 6.2)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from secfunet.tls.alerts import Alert, AlertDescription, AlertLevel
from secfunet.tls.errors import RecordError, TlsProtocolError

HEADER_LENGTH: Final = 5
MAX_PLAINTEXT: Final = 1 << 14
"""Largest content of a record (RFC 8446, 5.1)."""
MAX_CIPHERTEXT_TLS13: Final = MAX_PLAINTEXT + 256
MAX_CIPHERTEXT_TLS12: Final = MAX_PLAINTEXT + 2048
LEGACY_RECORD_VERSION: Final = 0x0303


class ContentType(enum.IntEnum):
    """The first byte of a record."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    APPLICATION_DATA = 23


_KNOWN_TYPES: Final = frozenset(int(kind) for kind in ContentType)


def parse_header(untrusted: bytes | bytearray | memoryview, offset: int, limit: int) -> tuple[int, int]:
    """Parse the five bytes at ``offset``; return content type and length of the fragment.

    Raises RecordError: unexpected_message for an unknown type, protocol_version when the major version is not 3
    (for example a plain HTTP answer), record_overflow past ``limit`` bytes.
    """
    kind = untrusted[offset]
    if kind not in _KNOWN_TYPES:
        raise RecordError(f"unknown record type {kind}", AlertDescription.UNEXPECTED_MESSAGE)
    if untrusted[offset + 1] != 3:
        raise RecordError("a record is not of TLS", AlertDescription.PROTOCOL_VERSION)
    length = untrusted[offset + 3] << 8 | untrusted[offset + 4]
    if length > limit:
        raise RecordError(f"a record of {length} bytes exceeds {limit}", AlertDescription.RECORD_OVERFLOW)
    return kind, length


def encode_header(kind: int, length: int, version: int = LEGACY_RECORD_VERSION) -> bytes:
    """Return the header of a record whose fragment has ``length`` bytes."""
    return bytes((kind, version >> 8, version & 0xFF, length >> 8, length & 0xFF))


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One record as it travels. ``raw`` is header and fragment."""

    kind: int
    raw: bytes

    @property
    def fragment(self) -> bytes:
        """What follows the header: plaintext or ciphertext."""
        return self.raw[HEADER_LENGTH:]

    @property
    def length(self) -> int:
        """Length of the fragment."""
        return len(self.raw) - HEADER_LENGTH


def encode_record(kind: int, fragment: bytes, version: int = LEGACY_RECORD_VERSION) -> bytes:
    """Return a record in clear (handshake and alerts before keys exist)."""
    return encode_header(kind, len(fragment), version) + fragment


def split_records(untrusted: bytes, limit: int = MAX_CIPHERTEXT_TLS12) -> list[Record]:
    """Cut whole records; used for flights that a card gives. Raises RecordError when the last record is cut short."""
    records = []
    offset = 0
    while offset < len(untrusted):
        if len(untrusted) - offset < HEADER_LENGTH:
            raise RecordError("a record is cut short", AlertDescription.DECODE_ERROR)
        kind, length = parse_header(untrusted, offset, limit)
        end = offset + HEADER_LENGTH + length
        if end > len(untrusted):
            raise RecordError("a record is cut short", AlertDescription.DECODE_ERROR)
        records.append(Record(kind, untrusted[offset:end]))
        offset = end
    return records


def parse_alert(untrusted: bytes | memoryview, *, is_tls13: bool = True) -> Alert:
    """Parse the content of an alert record. Alerts may not be split or joined (RFC 8446, 5.1).

    In TLS 1.3 the level says nothing (RFC 8446, 6): any is taken for the one that the description has.
    Raises TlsProtocolError: unexpected_message when it is empty (RFC 8446, 5.4; RFC 5246, 6.2.1), decode_error when it is not two bytes
    long, illegal_parameter for another level in TLS 1.2.
    """
    if not untrusted:
        raise TlsProtocolError("an empty alert", AlertDescription.UNEXPECTED_MESSAGE)
    if len(untrusted) != 2:
        raise TlsProtocolError("an alert is not two bytes long", AlertDescription.DECODE_ERROR)
    level, description = untrusted[0], untrusted[1]
    if is_tls13:
        quiet = description in (AlertDescription.CLOSE_NOTIFY, AlertDescription.USER_CANCELED)
        return Alert(AlertLevel.WARNING if quiet else AlertLevel.FATAL, description)
    if level not in (AlertLevel.WARNING, AlertLevel.FATAL):
        raise TlsProtocolError("an alert has an unknown level", AlertDescription.ILLEGAL_PARAMETER)
    return Alert(level, description)


class RecordBuffer:
    """Bytes from the network, held until a record is whole. Fixed memory: it never grows past its capacity.

    Readers that fill memory themselves use :meth:`writable` and :meth:`wrote`; others use :meth:`feed`. Records are looked at in
    place, through :attr:`view`, and given back with :meth:`consume`.
    """

    def __init__(self, capacity: int = 256 * 1024) -> None:
        self._memory = bytearray(max(capacity, 2 * (HEADER_LENGTH + MAX_CIPHERTEXT_TLS12)))
        self.view: Final = memoryview(self._memory)
        self.start = 0
        self.end = 0

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def capacity(self) -> int:
        """Most bytes that it can hold."""
        return len(self._memory)

    def writable(self) -> memoryview:
        """Return free memory behind what has come. It is never empty after all whole records were consumed."""
        if self.start == self.end:
            self.start = self.end = 0
        elif len(self._memory) - self.end < HEADER_LENGTH + MAX_CIPHERTEXT_TLS12:
            # At most one record is unfinished: the move is short, and happens once in a buffer's length.
            pending = self.end - self.start
            self.view[:pending] = bytes(self.view[self.start : self.end])
            self.start, self.end = 0, pending
        return self.view[self.end :]

    def wrote(self, count: int) -> None:
        """Say that ``count`` bytes were put into :meth:`writable`."""
        self.end += count

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Copy as much of ``data`` as fits; return how much that was."""
        room = self.writable()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        self.end += count
        return count

    def peek(self, limit: int) -> tuple[int, int] | None:
        """Return type and fragment length of the next record, or None until all of it is here.

        Raises RecordError as soon as its header is wrong, before the rest of it is awaited.
        """
        if self.end - self.start < HEADER_LENGTH:
            return None
        kind, length = parse_header(self.view, self.start, limit)
        if self.end - self.start < HEADER_LENGTH + length:
            return None
        return kind, length

    def scan(self, limit: int) -> list[tuple[int, int]]:
        """Return type and fragment length of the whole records in front, without consuming them, up to a header that is wrong."""
        seen, offset = [], self.start
        while self.end - offset >= HEADER_LENGTH:
            try:
                kind, length = parse_header(self.view, offset, limit)
            except RecordError:
                break
            offset += HEADER_LENGTH + length
            if offset > self.end:
                break
            seen.append((kind, length))
        return seen

    def consume(self, fragment_length: int) -> None:
        """Give back the next record's memory."""
        self.start += HEADER_LENGTH + fragment_length

    def take(self, limit: int) -> Record | None:
        """Return a copy of the next record, or None until it is whole. Raises RecordError."""
        seen = self.peek(limit)
        if seen is None:
            return None
        kind, length = seen
        raw = bytes(self.view[self.start : self.start + HEADER_LENGTH + length])
        self.consume(length)
        return Record(kind, raw)
