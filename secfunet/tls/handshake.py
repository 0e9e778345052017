"""The handshake messages that travel in clear, as far as the docking host must understand them (RFC 8446, 4; RFC 5246, 7.4)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import TLS_1_3
from secfunet.tls.errors import TlsProtocolError

MAX_MESSAGE: Final = 1 << 17
"""Largest handshake message accepted: a generous certificate chain."""
HELLO_RETRY_RANDOM: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a HelloRetryRequest (RFC 8446, 4.1.3)."""

_EXTENSION_STATUS_REQUEST: Final = 5
_EXTENSION_SESSION_TICKET: Final = 35
_EXTENSION_EARLY_DATA: Final = 42
_EXTENSION_SUPPORTED_VERSIONS: Final = 43


class HandshakeType(enum.IntEnum):
    """The first byte of a handshake message."""

    HELLO_REQUEST = 0
    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    NEW_SESSION_TICKET = 4
    ENCRYPTED_EXTENSIONS = 8
    CERTIFICATE = 11
    SERVER_KEY_EXCHANGE = 12
    CERTIFICATE_REQUEST = 13
    SERVER_HELLO_DONE = 14
    CERTIFICATE_VERIFY = 15
    CLIENT_KEY_EXCHANGE = 16
    FINISHED = 20
    CERTIFICATE_STATUS = 22
    KEY_UPDATE = 24


class HandshakeReader:
    """Joins the fragments of handshake messages, which need not end where records end. Bounded by MAX_MESSAGE."""

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self._pending = bytearray()
        self._max_message = max_message

    @property
    def is_between_messages(self) -> bool:
        """Whether all that came belongs to whole messages."""
        return not self._pending

    @property
    def begins_hello_request(self) -> bool:
        """Whether what came of the next message can be a HelloRequest, which is four zero bytes, and nothing else."""
        return 0 < len(self._pending) < 4 and not any(self._pending)

    def feed(self, untrusted_fragment: bytes) -> list[tuple[int, bytes]]:
        """Take the content of one record; return type and body of each message that is now whole.

        Raises TlsProtocolError: unexpected_message for an empty fragment, decode_error for a message that is too long.
        """
        if not untrusted_fragment:
            raise TlsProtocolError("an empty handshake record", AlertDescription.UNEXPECTED_MESSAGE)
        self._pending += untrusted_fragment
        messages = []
        while len(self._pending) >= 4:
            length = int.from_bytes(self._pending[1:4], "big")
            if length > self._max_message:
                raise TlsProtocolError(f"a handshake message of {length} bytes", AlertDescription.DECODE_ERROR)
            if len(self._pending) < 4 + length:
                break
            messages.append((self._pending[0], bytes(self._pending[4 : 4 + length])))
            del self._pending[: 4 + length]
        return messages


class _Cursor:
    """Reads a message from left to right; whatever is missing is a decode_error."""

    def __init__(self, untrusted: bytes) -> None:
        self._data = untrusted
        self._offset = 0

    @property
    def at_end(self) -> bool:
        return self._offset == len(self._data)

    def take(self, length: int) -> bytes:
        end = self._offset + length
        if end > len(self._data):
            raise TlsProtocolError("a hello message is cut short", AlertDescription.DECODE_ERROR)
        piece = self._data[self._offset : end]
        self._offset = end
        return piece

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def vector(self, length_bytes: int) -> bytes:
        return self.take(self.number(length_bytes))

    def extensions(self) -> dict[int, bytes]:
        if self.at_end:
            return {}
        inner = _Cursor(self.vector(2))
        if not self.at_end:
            raise TlsProtocolError("bytes after a hello message", AlertDescription.DECODE_ERROR)
        found: dict[int, bytes] = {}
        while not inner.at_end:
            number, value = inner.number(2), inner.vector(2)
            if number in found:
                raise TlsProtocolError("an extension came twice", AlertDescription.ILLEGAL_PARAMETER)
            found[number] = value
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class ServerHello:
    """What a ServerHello decides. ``version`` is the negotiated one, 0x0304 for TLS 1.3."""

    version: int
    suite: int
    is_retry: bool
    session_id: bytes = b""
    announces_ticket: bool = False
    """TLS 1.2: a NewSessionTicket comes (RFC 5077, 3.2)."""
    announces_status: bool = False
    """TLS 1.2: a CertificateStatus may come (RFC 6066, 8)."""


def parse_server_hello(untrusted_body: bytes) -> ServerHello:
    """Parse the body of a ServerHello or HelloRetryRequest (RFC 8446, 4.1.3).

    Raises TlsProtocolError: decode_error, or illegal_parameter when it selects compression.
    """
    cursor = _Cursor(untrusted_body)
    version = cursor.number(2)
    random = cursor.take(32)
    session_id = cursor.vector(1)
    if len(session_id) > 32:
        raise TlsProtocolError("a session id is too long", AlertDescription.DECODE_ERROR)
    suite = cursor.number(2)
    if cursor.number(1) != 0:
        raise TlsProtocolError("the server selected compression", AlertDescription.ILLEGAL_PARAMETER)
    extensions = cursor.extensions()
    selected = extensions.get(_EXTENSION_SUPPORTED_VERSIONS)
    if selected is not None:
        if len(selected) != 2:
            raise TlsProtocolError("supported_versions is malformed", AlertDescription.DECODE_ERROR)
        version = int.from_bytes(selected, "big")
    return ServerHello(
        version,
        suite,
        is_retry=version == TLS_1_3 and random == HELLO_RETRY_RANDOM,
        session_id=session_id,
        announces_ticket=_EXTENSION_SESSION_TICKET in extensions,
        announces_status=_EXTENSION_STATUS_REQUEST in extensions,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ClientHello:
    """What the host must know of a ClientHello. Early data is announced for the server that the client believes to know: whoever did not
    give it a ticket for that skips the data (RFC 8446, 4.2.10)."""

    session_id: bytes
    announces_early_data: bool


def check_client_hello(untrusted_body: bytes) -> ClientHello:
    """Check what the host can refuse in a ClientHello before it troubles a card; everything else is the card's to judge.

    Raises TlsProtocolError: decode_error; illegal_parameter when null compression is not offered.
    """
    cursor = _Cursor(untrusted_body)
    cursor.take(34)
    session_id = cursor.vector(1)
    if len(session_id) > 32:
        raise TlsProtocolError("a session id is too long", AlertDescription.DECODE_ERROR)
    suites = cursor.vector(2)
    if len(suites) < 2 or len(suites) % 2:
        raise TlsProtocolError("the list of cipher suites is malformed", AlertDescription.DECODE_ERROR)
    if 0 not in cursor.vector(1):
        raise TlsProtocolError("the client insists on compression", AlertDescription.ILLEGAL_PARAMETER)
    return ClientHello(session_id, announces_early_data=_EXTENSION_EARLY_DATA in cursor.extensions())
