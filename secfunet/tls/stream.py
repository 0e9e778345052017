"""A TLS connection after its handshake: application data both ways, alerts, key updates, tickets, bounds, and the orderly end.

Both roles, both versions, no IO. The caller fills :attr:`ProtectedStream.incoming`, calls :meth:`~ProtectedStream.receive`, and
sends what :meth:`~ProtectedStream.take_output` and the sealing methods give. After any exception the stream is dead.

Bounds: a peer may send 32 empty records, 32 key updates and 4 warnings without data in between, and handshake messages of at most
64 KiB; each is more than any honest stack needs. Tickets are dropped, however many come; the first 32 KiB of them are kept for the card.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import Final

from secfunet.tls.alerts import Alert, AlertDescription
from secfunet.tls.cipher_suites import TLS_1_3, Cipher, CipherSuite
from secfunet.tls.errors import (
    KeyUsageLimitError,
    PeerAlertError,
    TlsError,
    TlsProtocolError,
    TruncatedStreamError,
)
from secfunet.tls.flights import Role
from secfunet.tls.handshake import HandshakeReader, HandshakeType
from secfunet.tls.key_schedule import DirectionKeys, next_traffic_keys, split_hand_over
from secfunet.tls.protection import MAX_EXPANSION, RecordSealer, make_opener, make_sealer
from secfunet.tls.records import (
    HEADER_LENGTH,
    MAX_CIPHERTEXT_TLS12,
    MAX_CIPHERTEXT_TLS13,
    MAX_PLAINTEXT,
    ContentType,
    RecordBuffer,
    parse_alert,
)

GCM_RECORD_LIMIT: Final = int(2**24.5)
"""Records under one AES-GCM key (RFC 8446, 5.5)."""
MAX_EMPTY_RECORDS: Final = 32
MAX_KEY_UPDATES: Final = 32
MAX_WARNINGS: Final = 4
MAX_TICKETS: Final = 1 << 15
"""Most bytes of tickets' records that are kept for the card."""
MAX_POST_HANDSHAKE_MESSAGE: Final = 1 << 16
_APPLICATION_DATA: Final = int(ContentType.APPLICATION_DATA)


@dataclasses.dataclass(frozen=True, slots=True)
class HandOver:
    """What a stream begins with: the card's answer to CipherSuite and KeyBlock, parsed."""

    suite: CipherSuite
    key_block: bytes = dataclasses.field(repr=False)
    read_sequence: int
    write_sequence: int
    encrypt_then_mac: bool = False
    max_fragment: int = MAX_PLAINTEXT
    """Most bytes of content in a record that we write (RFC 6066, 4)."""


class ProtectedStream:
    """The record layer of one connection, from the moment that the card hands over its keys."""

    def __init__(
        self,
        role: Role,
        hand_over: HandOver,
        *,
        incoming: RecordBuffer | None = None,
        record_limit: int | None = None,
        randbytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """``incoming`` may already hold records that came behind the handshake. ``record_limit`` is how many records one key may
        protect (default: 2^24.5 for AES-GCM; else only the sequence numbers limit). Raises TlsError when the keys do not fit."""
        client, server = split_hand_over(hand_over.suite, hand_over.key_block)
        self._role = role
        self._suite = hand_over.suite
        self._etm = hand_over.encrypt_then_mac
        self._randbytes = randbytes
        self._write_keys, self._read_keys = (client, server) if role == "client" else (server, client)
        self._sealer = self._make_sealer(self._write_keys, hand_over.write_sequence)
        self._opener = make_opener(self._suite, self._read_keys, hand_over.read_sequence, encrypt_then_mac=self._etm)
        self.is_tls13: Final = hand_over.suite.version == TLS_1_3
        self._max_fragment = min(hand_over.max_fragment, MAX_PLAINTEXT)
        self._limit = MAX_CIPHERTEXT_TLS13 if self.is_tls13 else MAX_CIPHERTEXT_TLS12
        if record_limit is None:
            record_limit = GCM_RECORD_LIMIT if self._suite.cipher is Cipher.AES_GCM else (1 << 64) - 2
        self._record_limit = record_limit
        self.incoming: Final = RecordBuffer() if incoming is None else incoming
        self._messages = HandshakeReader(MAX_POST_HANDSHAKE_MESSAGE)
        self._output = bytearray()
        self._tickets: list[bytes] = []
        self._collects_tickets = self.is_tls13 and role == "client" and hand_over.read_sequence == 0
        self._collected = 0
        self._update_due = False
        self._error: TlsError | None = None
        self._empty_records = self._key_updates = self._warnings = 0
        self.key_updates_sent = 0
        self.key_updates_received = 0
        self.is_read_closed = False
        """Whether the peer's close_notify has come."""
        self.is_write_closed = False
        """Whether our close_notify (or a fatal alert) was made."""

    # ---- reading

    def receive(self) -> bytearray:
        """Open whole records of :attr:`incoming`; return the application data in them, in order. Call it until it returns nothing:
        data that came before an error is returned first, and the error raised by the next call.

        Afterwards :attr:`is_read_closed`, :meth:`take_output` and :meth:`take_tickets` may have news. Raises TlsProtocolError
        (tell the peer with :meth:`fatal_alert`) and PeerAlertError.
        """
        if self._error is not None:
            raise self._error
        plain = bytearray(len(self.incoming))
        with memoryview(plain) as out:
            filled = self._open_records(out)
            if self._error is not None:
                # The error's traceback still holds pieces of the memory, which can therefore not be cut.
                return bytearray(out[:filled])
        del plain[filled:]
        return plain

    def _open_records(self, out: memoryview) -> int:
        incoming = self.incoming
        view, peek, consume = incoming.view, incoming.peek, incoming.consume
        filled = 0
        try:
            while not self.is_read_closed:
                seen = peek(self._limit)
                if seen is None:
                    break
                length = seen[1]
                start = incoming.start
                kind, size = self._opener.open_into(view[start : start + HEADER_LENGTH + length], out[filled:])
                if kind == _APPLICATION_DATA:
                    self._collects_tickets = False
                    if size and self._messages.is_between_messages:
                        filled += size
                        self._empty_records = self._key_updates = self._warnings = 0
                    else:
                        self._odd_application_data()
                else:
                    self._control(kind, bytes(out[filled : filled + size]), start, length)
                consume(length)
        except TlsError as error:
            self._error = error
            if not filled:
                raise
        return filled

    def receive_eof(self) -> None:
        """Say that the connection below has ended. Raises TruncatedStreamError unless close_notify came first."""
        if not self.is_read_closed:
            raise TruncatedStreamError("in the middle of the stream")

    def drop_incoming(self) -> None:
        """Forget what came behind close_notify (RFC 8446, 6.1: it is ignored)."""
        self.incoming.start = self.incoming.end

    @property
    def has_output(self) -> bool:
        """Whether :meth:`take_output` has something."""
        return bool(self._output) or (self._update_due and not self.is_write_closed)

    @property
    def may_get_tickets(self) -> bool:
        """Whether tickets of TLS 1.3 would still be collected."""
        return self._collects_tickets

    @property
    def has_tickets(self) -> bool:
        """Whether :meth:`take_tickets` has something."""
        return bool(self._tickets)

    def take_tickets(self) -> bytes:
        """Return the raw records of the tickets that came first of all in TLS 1.3, for the card; later ones are not given out.

        A card counts records: only an unbroken run from the first one on is of use to it.
        """
        tickets = b"".join(self._tickets)
        self._tickets.clear()
        return tickets

    def stop_collecting_tickets(self) -> None:
        """Say that the card is gone: further tickets are dropped."""
        self._collects_tickets = False
        self._tickets.clear()

    # ---- writing

    def seal(self, data: bytes | bytearray | memoryview) -> bytearray:
        """Return the records that carry ``data``, after whatever the stream itself had to say.

        Raises KeyUsageLimitError when the key is used up in TLS 1.2, and TlsError after close_notify.
        """
        if self.is_write_closed:
            raise TlsError("the stream is closed for writing")
        content = memoryview(data)
        size = self._max_fragment
        count = -(-len(content) // size)
        out = bytearray(len(content) + count * MAX_EXPANSION)
        view = memoryview(out)
        filled = self._take_output_into(view)
        if filled is None:
            prefix = self.take_output()
            return prefix + self.seal(data)
        for offset in range(0, len(content), size):
            if self._sealer.sequence >= self._record_limit:
                # Rare: once in hundreds of gigabytes.
                self._write_key_used_up()
                done = bytearray(view[:filled])
                view.release()
                return done + self.seal(content[offset:])
            filled += self._sealer.seal_into(_APPLICATION_DATA, content[offset : offset + size], view[filled:])
        view.release()
        del out[filled:]
        return out

    def _take_output_into(self, view: memoryview) -> int | None:
        """Nothing to say (the usual case): 0. Something to say: None, and the caller puts it in front."""
        if not self._output and not self._update_due:
            return 0
        view.release()
        return None

    def take_output(self) -> bytearray:
        """Return and forget what the stream itself must send: answers to key updates, refusals."""
        if self._update_due and not self.is_write_closed:
            self._update_due = False
            self._update_write_key(request_peer=False)
        output, self._output = self._output, bytearray()
        return output

    def update_key(self, *, request_peer: bool) -> None:
        """Change the write key now (KeyUpdate, RFC 8446, 4.6.3); with ``request_peer`` the peer must change its own too.

        Raises TlsProtocolError in TLS 1.2.
        """
        if self.is_write_closed:
            raise TlsError("the stream is closed for writing")
        self._update_write_key(request_peer=request_peer)

    def close_notify(self) -> None:
        """Queue the orderly end of our direction; nothing can be sealed afterwards. Does nothing the second time."""
        if not self.is_write_closed:
            # An answer to a key update must still go out, and before.
            self._output = self.take_output()
            self._queue(ContentType.ALERT, Alert.warning(AlertDescription.CLOSE_NOTIFY).encode())
            self.is_write_closed = True

    def fatal_alert(self, description: AlertDescription) -> None:
        """Queue the alert that ends the connection. Does nothing after an end."""
        if not self.is_write_closed:
            self._queue(ContentType.ALERT, Alert.fatal(description).encode())
            self.is_write_closed = True

    # ---- inside

    def _make_sealer(self, keys: DirectionKeys, sequence: int) -> RecordSealer:
        return make_sealer(self._suite, keys, sequence, encrypt_then_mac=self._etm, randbytes=self._randbytes)

    def _queue(self, kind: ContentType, content: bytes) -> None:
        room = bytearray(len(content) + MAX_EXPANSION)
        with memoryview(room) as view:
            length = self._sealer.seal_into(kind, content, view)
        self._output += room[:length]

    def _write_key_used_up(self) -> None:
        if not self.is_tls13:
            raise KeyUsageLimitError(f"{self._record_limit} records were protected under one key of TLS 1.2")
        self._update_write_key(request_peer=False)

    def _update_write_key(self, *, request_peer: bool) -> None:
        keys = next_traffic_keys(self._suite, self._write_keys)
        self._queue(ContentType.HANDSHAKE, bytes((HandshakeType.KEY_UPDATE, 0, 0, 1, 1 if request_peer else 0)))
        self._write_keys = keys
        self._sealer = self._make_sealer(keys, 0)
        self.key_updates_sent += 1

    def _odd_application_data(self) -> None:
        if not self._messages.is_between_messages:
            raise TlsProtocolError("data in the middle of a handshake message", AlertDescription.UNEXPECTED_MESSAGE)
        self._empty_records += 1
        if self._empty_records > MAX_EMPTY_RECORDS:
            raise TlsProtocolError("too many empty records", AlertDescription.UNEXPECTED_MESSAGE)

    def _control(self, kind: int, content: bytes, start: int, length: int) -> None:
        if kind == ContentType.ALERT:
            if not self._messages.is_between_messages and self.is_tls13:
                raise TlsProtocolError("an alert in the middle of a message", AlertDescription.UNEXPECTED_MESSAGE)
            self._alert(parse_alert(content, is_tls13=self.is_tls13))
        elif kind == ContentType.HANDSHAKE:
            raw = bytes(self.incoming.view[start : start + HEADER_LENGTH + length]) if self._collects_tickets else b""
            messages = self._messages.feed(content)
            if self.is_tls13 and any(message == HandshakeType.KEY_UPDATE for message, _ in messages[:-1]):
                raise TlsProtocolError("a message behind a KeyUpdate", AlertDescription.UNEXPECTED_MESSAGE)
            for message, body in messages:
                self._post_handshake(message, body)
            if raw and self._collects_tickets:
                self._collect(raw)
        else:
            raise TlsProtocolError(f"a record of type {kind} behind the handshake", AlertDescription.UNEXPECTED_MESSAGE)

    def _collect(self, raw: bytes) -> None:
        """Keep a record of the first tickets for the card, as long as they are few."""
        self._collected += len(raw)
        if self._collected > MAX_TICKETS:
            self._collects_tickets = False
        else:
            self._tickets.append(raw)

    def _alert(self, alert: Alert) -> None:
        if alert.is_close_notify:
            self.is_read_closed = True
            return
        if alert.is_fatal:
            raise PeerAlertError(alert.description)
        self._warn()

    def _warn(self) -> None:
        self._warnings += 1
        if self._warnings > MAX_WARNINGS:
            raise TlsProtocolError("too many warnings", AlertDescription.UNEXPECTED_MESSAGE)

    def _post_handshake(self, message: int, body: bytes) -> None:
        if self.is_tls13:
            if message == HandshakeType.KEY_UPDATE:
                self._key_update(body)
                return
            if message == HandshakeType.NEW_SESSION_TICKET and self._role == "client":
                return  # it costs nothing to drop, however many there are
        elif message == (HandshakeType.HELLO_REQUEST if self._role == "client" else HandshakeType.CLIENT_HELLO):
            # Renegotiation is refused; the connection goes on (RFC 5246, 7.2.2).
            self._warn()
            if not self.is_write_closed:
                self._queue(ContentType.ALERT, Alert.warning(AlertDescription.NO_RENEGOTIATION).encode())
            return
        raise TlsProtocolError(f"handshake message {message} out of turn", AlertDescription.UNEXPECTED_MESSAGE)

    def _key_update(self, body: bytes) -> None:
        self._collects_tickets = False
        if len(body) != 1:
            raise TlsProtocolError("a malformed KeyUpdate", AlertDescription.DECODE_ERROR)
        if body[0] > 1:
            raise TlsProtocolError("a KeyUpdate asks for an unknown thing", AlertDescription.ILLEGAL_PARAMETER)
        if not self._messages.is_between_messages:
            raise TlsProtocolError("a message crosses a key change", AlertDescription.UNEXPECTED_MESSAGE)
        self._key_updates += 1
        if self._key_updates > MAX_KEY_UPDATES:
            raise TlsProtocolError("too many key updates without data", AlertDescription.UNEXPECTED_MESSAGE)
        self._read_keys = next_traffic_keys(self._suite, self._read_keys)
        self._opener = make_opener(self._suite, self._read_keys, 0, encrypt_then_mac=False)
        self.key_updates_received += 1
        # However many requests come before we write, one answer serves them all (RFC 8446, 4.6.3).
        self._update_due |= body[0] == 1
