"""Which bytes of the peer make the next flight for the card.

TLS 1.2 tells in clear: a server's flight ends with ServerHelloDone, or with the Finished behind ChangeCipherSpec when the session is
resumed; a client's with its ClientHello and with its Finished (RFC 5246, 7.3).

In TLS 1.3 all after ServerHello is encrypted under keys that only the card has, so the end cannot be read: the card says when it has all,
and must not be given a record beyond the end, because that one is already the host's. What can be read is lengths. A Finished
that has a record to itself is 4 + hash + 1 + 16 bytes long, and the CertificateVerify before it has one of few lengths, all
shorter than any record that holds a certificate too. So everything is given at once up to a record of a Finished's length that is
either the first that is long enough for one, or comes right behind a CertificateVerify. Anything else is given record by record,
each up to the next that may hold a Finished: stacks that join messages in one record lose nothing by that.
"""

from __future__ import annotations

import enum
import itertools
from typing import Final, Literal

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.errors import PeerAlertError, TlsProtocolError, UnsupportedSuiteError
from secfunet.tls.handshake import (
    HandshakeReader,
    HandshakeType,
    ServerHello,
    check_client_hello,
    parse_server_hello,
)
from secfunet.tls.records import (
    MAX_CIPHERTEXT_TLS12,
    ContentType,
    Record,
    RecordBuffer,
    parse_alert,
    split_records,
)

MAX_FLIGHT: Final = 1 << 17
"""Most bytes of one flight."""
MAX_WARNINGS: Final = 4
_AEAD_TAG: Final = 16
_INNER_TYPE: Final = 1
_ALERT_RECORD: Final = 2 + _INNER_TYPE + _AEAD_TAG
_VERIFY_OVERHEAD: Final = 4 + 2 + 2 + _INNER_TYPE + _AEAD_TAG
_VERIFY_LENGTHS: Final = frozenset(
    _VERIFY_OVERHEAD + signature
    for signature in (
        *(64, 114),  # Ed25519, Ed448
        *range(68, 73),  # ECDSA over P-256
        *range(100, 105),  # ECDSA over P-384
        *range(134, 140),  # ECDSA over P-521
        *(256, 384),  # RSA-2048, RSA-3072; with RSA-4096 a joined record could be as short
    )
)

Role = Literal["client", "server"]


class _Phase(enum.Enum):
    HELLO = enum.auto()  # the peer's hello is due
    OWN_HELLO = enum.auto()  # server: the card's ServerHello is due
    CLEAR = enum.auto()  # TLS 1.2 messages in clear
    FINISHED = enum.auto()  # TLS 1.2: ChangeCipherSpec seen, one encrypted record is due
    ENCRYPTED = enum.auto()  # TLS 1.3: the card decides
    DONE = enum.auto()  # TLS 1.2: both Finished are known


_SERVER_MESSAGES: Final = frozenset(
    {
        HandshakeType.CERTIFICATE,
        HandshakeType.CERTIFICATE_STATUS,
        HandshakeType.SERVER_KEY_EXCHANGE,
        HandshakeType.CERTIFICATE_REQUEST,
        HandshakeType.SERVER_HELLO_DONE,
        HandshakeType.NEW_SESSION_TICKET,
    }
)
_CLIENT_MESSAGES: Final = frozenset(
    {HandshakeType.CERTIFICATE, HandshakeType.CLIENT_KEY_EXCHANGE, HandshakeType.CERTIFICATE_VERIFY}
)


class FlightDetector:
    """Follows one handshake. ``role`` is ours: the flights it finds are the peer's."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._phase = _Phase.HELLO
        self._messages = HandshakeReader()
        self._flight = bytearray()
        self._retried = False
        self._warnings = 0
        self.hello: ServerHello | None = None
        """The ServerHello that decided, once it is known."""

    @property
    def version(self) -> int | None:
        """The negotiated version, or None before ServerHello."""
        return None if self.hello is None else self.hello.version

    @property
    def is_certain(self) -> bool:
        """Whether the peer's last flight was given out: TLS 1.2 only."""
        return self._phase is _Phase.DONE

    @property
    def waits_for_peer(self) -> bool:
        """Whether nothing of a flight has come yet."""
        return not self._flight and self._messages.is_between_messages

    def next_flight(self, buffer: RecordBuffer, *, at_eof: bool = False) -> bytes | None:
        """Take the next flight out of ``buffer``, or return None until more has come.

        ``at_eof`` says that nothing more comes: what is there goes to the card, which may find an alert in it.
        Raises TlsProtocolError, PeerAlertError for an alert in clear, UnsupportedSuiteError for a suite we cannot protect.
        """
        while self._phase is not _Phase.ENCRYPTED:
            record = buffer.take(MAX_CIPHERTEXT_TLS12)
            if record is None:
                return None
            if self._take_clear(record):
                return self._end_flight()
        return self._next_encrypted(buffer, at_eof)

    def own_flight(self, flight: bytes) -> None:
        """Tell what the card sends; a server's first flight holds the ServerHello that decides the version."""
        if self._phase is not _Phase.OWN_HELLO:
            return
        reader = HandshakeReader()
        for record in split_records(flight):
            if record.kind != ContentType.HANDSHAKE:
                continue
            for kind, body in reader.feed(record.fragment):
                if kind == HandshakeType.SERVER_HELLO:
                    self._server_hello(body)
                    return
        raise TlsProtocolError("the card's flight holds no ServerHello", AlertDescription.INTERNAL_ERROR)

    def _end_flight(self) -> bytes:
        flight = bytes(self._flight)
        self._flight.clear()
        return flight

    def _keep(self, raw: bytes) -> None:
        self._flight += raw
        if len(self._flight) > MAX_FLIGHT:
            raise TlsProtocolError("a handshake flight is too long", AlertDescription.RECORD_OVERFLOW)

    def _take_clear(self, record: Record) -> bool:
        """Take one record of the phases in clear; return whether it ends a flight."""
        if self._phase in (_Phase.OWN_HELLO, _Phase.DONE):
            raise TlsProtocolError("a record came out of turn", AlertDescription.UNEXPECTED_MESSAGE)
        if record.kind == ContentType.ALERT and self._phase is not _Phase.FINISHED:
            self._alert(record.fragment)
            return False
        self._keep(record.raw)
        if record.kind == ContentType.CHANGE_CIPHER_SPEC:
            self._change_cipher_spec(record.fragment)
            return False
        if self._phase is _Phase.FINISHED and record.kind != ContentType.APPLICATION_DATA:
            # The Finished, or an encrypted alert in its place: only the card can tell.
            self._phase = _Phase.DONE
            return True
        if record.kind != ContentType.HANDSHAKE or self._phase is _Phase.FINISHED:
            raise TlsProtocolError("a record is not of the handshake", AlertDescription.UNEXPECTED_MESSAGE)
        return self._handshake(record.fragment)

    def _handshake(self, fragment: bytes) -> bool:
        ended = False
        for kind, body in self._messages.feed(fragment):
            if ended or self._phase is _Phase.ENCRYPTED:
                raise TlsProtocolError("a message behind the end of a flight", AlertDescription.UNEXPECTED_MESSAGE)
            ended = self._hello(kind, body) if self._phase is _Phase.HELLO else self._clear_message(kind)
        if (ended or self._phase is _Phase.ENCRYPTED) and not self._messages.is_between_messages:
            raise TlsProtocolError("a message behind the end of a flight", AlertDescription.UNEXPECTED_MESSAGE)
        return ended

    def _hello(self, kind: int, body: bytes) -> bool:
        if self._role == "server":
            if kind != HandshakeType.CLIENT_HELLO:
                raise TlsProtocolError("no ClientHello where one is due", AlertDescription.UNEXPECTED_MESSAGE)
            check_client_hello(body)
            self._phase = _Phase.OWN_HELLO
            return True
        if kind != HandshakeType.SERVER_HELLO:
            raise TlsProtocolError("no ServerHello where one is due", AlertDescription.UNEXPECTED_MESSAGE)
        return self._server_hello(body)

    def _server_hello(self, body: bytes) -> bool:
        """Learn version and suite; return whether it is a retry request, which is a flight of its own."""
        hello = parse_server_hello(body)
        if hello.version not in (TLS_1_2, TLS_1_3):
            raise TlsProtocolError(f"TLS version {hello.version:#06x}", AlertDescription.PROTOCOL_VERSION)
        suite = SUITES.get(hello.suite)
        if suite is None or suite.version != hello.version:
            raise UnsupportedSuiteError(hello.suite, "is unknown here, or not of this version")
        if hello.is_retry:
            if self._retried:
                raise TlsProtocolError("a second HelloRetryRequest", AlertDescription.UNEXPECTED_MESSAGE)
            self._retried = True
            self._phase = _Phase.HELLO
            return True
        self.hello = hello
        self._phase = _Phase.ENCRYPTED if hello.version == TLS_1_3 else _Phase.CLEAR
        return False

    def _clear_message(self, kind: int) -> bool:
        allowed = _CLIENT_MESSAGES if self._role == "server" else _SERVER_MESSAGES
        if kind not in allowed:
            raise TlsProtocolError(f"handshake message {kind} out of turn", AlertDescription.UNEXPECTED_MESSAGE)
        return kind == HandshakeType.SERVER_HELLO_DONE

    def _change_cipher_spec(self, fragment: bytes) -> None:
        if fragment != b"\x01" or not self._messages.is_between_messages:
            raise TlsProtocolError("a malformed ChangeCipherSpec", AlertDescription.UNEXPECTED_MESSAGE)
        if self._phase is _Phase.CLEAR:
            self._phase = _Phase.FINISHED
        elif not (self._phase is _Phase.HELLO and self._retried):
            # TLS 1.3 allows one for old middleboxes, after the first hello (RFC 8446, D.4).
            raise TlsProtocolError("ChangeCipherSpec out of turn", AlertDescription.UNEXPECTED_MESSAGE)

    def _alert(self, fragment: bytes) -> None:
        alert = parse_alert(fragment)
        if alert.is_fatal or alert.is_close_notify or self.version == TLS_1_3:
            raise PeerAlertError(alert.description)
        self._warnings += 1
        if self._warnings > MAX_WARNINGS:
            raise TlsProtocolError("too many warnings", AlertDescription.UNEXPECTED_MESSAGE)

    def _next_encrypted(self, buffer: RecordBuffer, at_eof: bool) -> bytes | None:
        if self.hello is None:
            raise AssertionError("the encrypted phase begins with a ServerHello")
        finished = 4 + SUITES[self.hello.suite].hash_length + _INNER_TYPE + _AEAD_TAG
        lengths = buffer.scan(MAX_CIPHERTEXT_TLS12)
        last = _last_of_flight(lengths, finished)
        if last is None:
            if not (at_eof and lengths):
                if len(buffer) + len(self._flight) > MAX_FLIGHT:
                    raise TlsProtocolError("a handshake flight is too long", AlertDescription.RECORD_OVERFLOW)
                return None
            last = len(lengths) - 1
        for _ in range(last + 1):
            record = buffer.take(MAX_CIPHERTEXT_TLS12)
            if record is None:
                raise AssertionError("a scanned record is there")
            self._encrypted_record(record)
        return self._end_flight()

    def _encrypted_record(self, record: Record) -> None:
        if record.kind == ContentType.ALERT:
            self._alert(record.fragment)
        elif record.kind == ContentType.CHANGE_CIPHER_SPEC:
            if record.fragment != b"\x01":
                raise TlsProtocolError("a malformed ChangeCipherSpec", AlertDescription.UNEXPECTED_MESSAGE)
        elif record.kind != ContentType.APPLICATION_DATA or record.length < _AEAD_TAG + _INNER_TYPE:
            raise TlsProtocolError("a record in clear behind ServerHello", AlertDescription.UNEXPECTED_MESSAGE)
        self._keep(record.raw)


def _last_of_flight(records: list[tuple[int, int]], finished: int) -> int | None:
    """Return the index of the last record that may be given to the card, or None when none may end a flight (yet).

    ``records`` are types and lengths. An alert or a message in clear is an end, too: it is looked at without delay.
    """
    lengths = [length if kind == ContentType.APPLICATION_DATA else 0 for kind, length in records]
    possible = [
        index
        for index, (kind, _) in enumerate(records)
        if lengths[index] >= finished
        or lengths[index] == _ALERT_RECORD
        or kind in (ContentType.ALERT, ContentType.HANDSHAKE)
    ]
    if not possible:
        return None
    for before, index in itertools.pairwise(possible):
        if lengths[index] == finished and index == before + 1 and lengths[before] in _VERIFY_LENGTHS:
            return index
    return possible[0]
