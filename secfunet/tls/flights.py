"""Which bytes of the peer go to the card next.

What travels in clear is followed: a flight ends with a ClientHello, a HelloRetryRequest, or (TLS 1.2) a ServerHelloDone.

What is encrypted cannot be followed: TLS 1.3 behind the ServerHello, TLS 1.2 behind ChangeCipherSpec. Only the card knows where the peer's
Finished ends, so nothing is concluded from lengths. Whatever whole records are there are given to the card. It looks at them one by one and
at none behind the Finished; it says that it needs more, or that the handshake is over and how many bytes it did not use. What was given
stays in the buffer until then: what the card did not use is where it was. A card that does not report what it did not use is
given a single record at a time. What cannot be a record is given too, as it is: the alert for it is under keys that only the card has.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Final, Literal

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.errors import PeerAlertError, RecordError, TlsError, TlsProtocolError, UnsupportedSuiteError
from secfunet.tls.handshake import (
    HandshakeReader,
    HandshakeType,
    ServerHello,
    check_client_hello,
    parse_server_hello,
)
from secfunet.tls.message_order import CHANGE_CIPHER_SPEC, MessageOrder
from secfunet.tls.records import (
    HEADER_LENGTH,
    MAX_CIPHERTEXT_TLS12,
    ContentType,
    Record,
    RecordBuffer,
    parse_alert,
    parse_header,
    split_records,
)

MAX_FLIGHT: Final = 1 << 17
"""Most bytes that the card is given at once, and most of a flight in clear."""
MAX_ENCRYPTED_FLIGHT: Final = 1 << 22
"""Most bytes of an encrypted flight: 100 kB of certificates, which is what OpenSSL takes, in records of one byte fit in."""
FIRST_PIECE: Final = 1 << 14
"""Most bytes (or one record) of an encrypted flight that the card is given first, and twice as many each further time: nearly every flight
fits, and data behind it does not go all the way to the card and back."""
MAX_WARNINGS: Final = 4
_CHANGE: Final = b"\x01"
"""What a ChangeCipherSpec says."""

Role = Literal["client", "server"]


class _Phase(enum.Enum):
    HELLO = enum.auto()  # the peer's hello is due
    OWN_HELLO = enum.auto()  # server: the card's ServerHello is due
    CLEAR = enum.auto()  # TLS 1.2 messages in clear
    ENCRYPTED = enum.auto()  # the card decides


class FlightDetector:
    """Follows one handshake. ``role`` is ours: the flights it finds are the peer's."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._phase = _Phase.HELLO
        self._messages = HandshakeReader()
        self._order: MessageOrder | None = None
        self._flight = bytearray()
        self._is_given = False
        self._given: list[int] = []
        self._piece = FIRST_PIECE
        self._used = 0
        self._malformed: RecordError | None = None
        self._session_id = b""
        self._early_data = False
        self._retried = False
        self._warnings = 0
        self.reports_unused = False
        """Whether the card says how much it did not use."""
        self.hello: ServerHello | None = None
        """The ServerHello that decided, once it is known."""

    @property
    def version(self) -> int | None:
        """The negotiated version, or None before ServerHello."""
        return None if self.hello is None else self.hello.version

    @property
    def is_encrypted(self) -> bool:
        """Whether the peer's flight is encrypted, so that the card decides where it ends."""
        return self._phase is _Phase.ENCRYPTED

    def next_flight(self, buffer: RecordBuffer) -> bytes | None:
        """Return what the card is to be given next out of ``buffer``, or None until more has come.

        Called again in an encrypted flight it means that the card has used all of it and needs more. Raises TlsProtocolError,
        PeerAlertError for an alert in clear, UnsupportedSuiteError for a suite we cannot protect.
        """
        while self._phase is not _Phase.ENCRYPTED:
            record = buffer.take(MAX_CIPHERTEXT_TLS12)
            if record is None:
                return None
            if self._take_clear(record):
                flight = bytes(self._flight)
                self._flight.clear()
                return flight
        if self._malformed is not None:
            raise self._malformed  # the card had it, and made nothing of it
        if self._is_given:
            self._drop(buffer, sum(self._given))
            self._piece = min(2 * self._piece, MAX_FLIGHT)
        return self.gather(buffer)

    def gather(self, buffer: RecordBuffer) -> bytes | None:
        """What :meth:`next_flight` returned last of an encrypted flight, with what has come since."""
        self._given = self._choose(buffer)
        if not self._given and not (self._flight and self.version == TLS_1_3):
            return None
        size = sum(self._given)
        if len(self._flight) + size > MAX_FLIGHT or self._used + size > MAX_ENCRYPTED_FLIGHT:
            raise TlsProtocolError("a handshake flight is too long", AlertDescription.RECORD_OVERFLOW)
        self._is_given = True
        return bytes(self._flight) + bytes(buffer.view[buffer.start : buffer.start + size])

    def seems_whole(self, buffer: RecordBuffer) -> bool:
        """Whether there is an encrypted record and none is cut short: a hint that now is a good moment to ask the card."""
        seen = buffer.scan(MAX_CIPHERTEXT_TLS12)
        is_aligned = sum(HEADER_LENGTH + length for _, length in seen) == len(buffer)
        return is_aligned and any(kind != ContentType.CHANGE_CIPHER_SPEC for kind, _ in seen)

    def finish(self, buffer: RecordBuffer, unused: int) -> None:
        """The card's handshake is over: take out of ``buffer`` what it used of what it was given last.

        Raises TlsError when ``unused`` is not the length of whole records, or leaves nothing that ended the handshake.
        """
        size, left = sum(self._given), 0
        for length in reversed(self._given[1:]):
            if left >= unused:
                break
            left += length
        if left != unused:
            raise TlsError(f"the card says that it did not use {unused} of {size} bytes: they are not whole records")
        self._drop(buffer, size - unused)

    def own_flight(self, flight: bytes) -> None:
        """Tell what the card sends, in order."""
        if self._phase is _Phase.ENCRYPTED or (self._role == "client" and self._phase is not _Phase.HELLO):
            return
        reader, seen = HandshakeReader(), set()
        for record in split_records(flight):
            if record.kind == ContentType.CHANGE_CIPHER_SPEC:
                seen.add(CHANGE_CIPHER_SPEC)
            if record.kind != ContentType.HANDSHAKE or CHANGE_CIPHER_SPEC in seen:
                continue
            for kind, body in reader.feed(record.fragment):
                seen.add(kind)
                if kind == HandshakeType.SERVER_HELLO:
                    self._server_hello(body)
                elif kind == HandshakeType.CLIENT_HELLO:
                    with contextlib.suppress(TlsProtocolError):  # the server's to judge
                        self._session_id = check_client_hello(body).session_id
        if self._role == "client":
            return
        if HandshakeType.SERVER_HELLO not in seen:
            raise TlsProtocolError("the card's flight holds no ServerHello", AlertDescription.INTERNAL_ERROR)
        if self._phase is _Phase.CLEAR:
            self._order = MessageOrder.of_client(seen)

    # ---- in clear

    def _keep(self, raw: bytes) -> None:
        self._flight += raw
        if len(self._flight) > MAX_FLIGHT:
            raise TlsProtocolError("a handshake flight is too long", AlertDescription.RECORD_OVERFLOW)

    def _take_clear(self, record: Record) -> bool:
        """Take one record of the phases in clear; return whether it ends a flight."""
        if self._phase is _Phase.OWN_HELLO:
            raise TlsProtocolError("a record came out of turn", AlertDescription.UNEXPECTED_MESSAGE)
        if record.kind == ContentType.ALERT:
            self._alert(record.fragment)
            return False
        self._keep(record.raw)
        if record.kind == ContentType.CHANGE_CIPHER_SPEC:
            self._change_cipher_spec(record.fragment)
            return False
        if record.kind == ContentType.APPLICATION_DATA and self._skips_early_data:
            return False
        if record.kind != ContentType.HANDSHAKE:
            raise TlsProtocolError("a record is not of the handshake", AlertDescription.UNEXPECTED_MESSAGE)
        return self._handshake(record.fragment)

    @property
    def _skips_early_data(self) -> bool:
        """Early data comes before the second ClientHello; the card drops it, within its bound (RFC 8446, 4.2.10)."""
        return self._early_data and self._retried and self._phase is _Phase.HELLO and self._messages.is_between_messages

    def _handshake(self, fragment: bytes) -> bool:
        ended = False
        for kind, body in self._messages.feed(fragment):
            if kind == HandshakeType.HELLO_REQUEST and self._role == "client" and not body:
                continue  # a handshake is under way: it says nothing (RFC 5246, 7.4.1.1)
            if ended or self._phase is _Phase.ENCRYPTED:
                raise TlsProtocolError("a message behind the end of a flight", AlertDescription.UNEXPECTED_MESSAGE)
            ended = self._hello(kind, body) if self._phase is _Phase.HELLO else self._clear_message(kind, body)
        is_clean = self._messages.is_between_messages
        if self._role == "client" and self._phase is _Phase.CLEAR:
            is_clean |= self._messages.begins_hello_request
        if (ended or self._phase is _Phase.ENCRYPTED) and not is_clean:
            raise TlsProtocolError("a message behind the end of a flight", AlertDescription.UNEXPECTED_MESSAGE)
        return ended

    def _hello(self, kind: int, body: bytes) -> bool:
        if self._role == "server":
            if kind != HandshakeType.CLIENT_HELLO:
                raise TlsProtocolError("no ClientHello where one is due", AlertDescription.UNEXPECTED_MESSAGE)
            self._early_data = check_client_hello(body).announces_early_data
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
        if hello.version == TLS_1_3:
            self._phase = _Phase.ENCRYPTED
            return False
        self._phase = _Phase.CLEAR
        if self._role == "client":
            may_resume = bool(hello.session_id) and hello.session_id == self._session_id
            self._order = MessageOrder.of_server(hello, has_key_exchange=suite.forward_secret, may_resume=may_resume)
        return False

    def _clear_message(self, kind: int, body: bytes) -> bool:
        self._next_in_order(kind, body)
        return kind == HandshakeType.SERVER_HELLO_DONE

    def _next_in_order(self, kind: int, body: bytes = b"") -> None:
        if self._order is None:
            raise AssertionError("messages of TLS 1.2 come behind a ServerHello")
        self._order.take(kind, body)

    def _change_cipher_spec(self, fragment: bytes) -> None:
        if fragment != _CHANGE or not self._messages.is_between_messages:
            raise TlsProtocolError("a malformed ChangeCipherSpec", AlertDescription.UNEXPECTED_MESSAGE)
        if self._phase is _Phase.CLEAR:
            self._next_in_order(CHANGE_CIPHER_SPEC)
            self._phase = _Phase.ENCRYPTED
        elif not (self._phase is _Phase.HELLO and self._retried):
            # TLS 1.3 allows one for old middleboxes, after the first hello (RFC 8446, D.4).
            raise TlsProtocolError("ChangeCipherSpec out of turn", AlertDescription.UNEXPECTED_MESSAGE)

    def _alert(self, fragment: bytes) -> None:
        alert = parse_alert(fragment, is_tls13=self.version == TLS_1_3)
        if alert.is_fatal or alert.is_close_notify or self.version == TLS_1_3:
            raise PeerAlertError(alert.description)
        self._warnings += 1
        if self._warnings > MAX_WARNINGS:
            raise TlsProtocolError("too many warnings", AlertDescription.UNEXPECTED_MESSAGE)

    # ---- encrypted

    def _drop(self, buffer: RecordBuffer, size: int) -> None:
        """Take ``size`` bytes out of the front of ``buffer``: the card has used them."""
        buffer.start += size
        self._used += size
        self._is_given, self._given = False, []
        self._flight.clear()

    def _choose(self, buffer: RecordBuffer) -> list[int]:
        """Lengths of the records, in front of ``buffer``, for the card; none when only ChangeCipherSpecs have come, which end no flight."""
        chosen: list[int] = []
        size, is_worth_asking, is_first = 0, False, not self._used
        for kind, length in buffer.scan(MAX_CIPHERTEXT_TLS12):
            whole = HEADER_LENGTH + length
            if chosen and size + whole > min(self._piece, MAX_FLIGHT - len(self._flight)):
                break
            content = buffer.view[buffer.start + size + HEADER_LENGTH : buffer.start + size + whole]
            if kind == ContentType.ALERT and is_first and length == 2 and self.version == TLS_1_3:
                # A peer that cannot go on behind the ServerHello says so in clear. Any other alert is the card's to judge.
                self._alert(bytes(content))
            is_change = kind == ContentType.CHANGE_CIPHER_SPEC and bytes(content) == _CHANGE
            is_first &= is_change
            chosen.append(whole)
            size += whole
            if not is_change:
                is_worth_asking = True
                if not self.reports_unused:
                    break
        if is_worth_asking or size >= FIRST_PIECE:
            return chosen
        unreadable = self._unreadable(buffer, size)
        return [*chosen, unreadable] if unreadable else []

    def _unreadable(self, buffer: RecordBuffer, offset: int) -> int:
        """How much at ``offset`` cannot be the beginning of a record: the card has the alert for it."""
        left = len(buffer) - offset
        if left >= HEADER_LENGTH:
            try:
                parse_header(buffer.view, buffer.start + offset, MAX_CIPHERTEXT_TLS12)
            except RecordError as error:
                self._malformed = error
                return min(left, FIRST_PIECE)
        return 0
