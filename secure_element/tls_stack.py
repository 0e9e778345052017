"""One TLS handshake of a card: pyOpenSSL over memory BIOs, fed one record at a time. Sans-IO, client or server, TLS 1.2 or 1.3.

Records are fed one by one so that OpenSSL never holds a byte from beyond the handshake: what it did not need is counted, and the docking
host takes the record layer over exactly there (``NegotiatedTls``). The key block of TLS 1.2 is computed from the
master secret (RFC 5246, 6.3); the traffic secrets of TLS 1.3 come from OpenSSL's key log.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from secfunet.card.parameters import MAX_PEER_CERTIFICATES, TLS_1_3, NegotiatedTls, TlsParameters
from secfunet.errors import SecFuNetError
from secfunet.tls.alerts import Alert, AlertDescription
from secfunet.tls.cipher_suites import SUITES
from secfunet.tls.key_schedule import key_block_tls12
from secfunet.tls.records import HEADER_LENGTH, MAX_CIPHERTEXT_TLS12, ContentType, encode_record
from secure_element import openssl_private
from secure_element.server_hello import ServerHelloWatcher
from secure_element.tls_context import NoApplicationProtocolError, is_valid_at
from secure_element.tls_sessions import ClientSession

_MAX_OUTPUT: Final = 1 << 18
_ALERT_SENT: Final = SSL.SSL_CB_WRITE_ALERT
_ALERT_RECEIVED: Final = SSL.SSL_CB_READ_ALERT
_CLIENT_SECRET: Final = b"CLIENT_TRAFFIC_SECRET_0"
_SERVER_SECRET: Final = b"SERVER_TRAFFIC_SECRET_0"


class TlsHandshakeError(SecFuNetError):
    """The handshake failed. ``flight`` has what must still reach the peer: the alert, if one is due.

    ``alert`` is its description (of the peer's, if ``from_peer``), or None; ``certificate_error`` the X509_V_ERR_… that was the cause,
    or 0.
    """

    def __init__(
        self, reason: str, *, flight: bytes, alert: int | None, from_peer: bool, certificate_error: int = 0
    ) -> None:
        text = f"the TLS handshake failed: {reason}"
        if alert is not None:
            text += f" ({'received' if from_peer else 'sent'} {AlertDescription.name_of(alert)})"
        super().__init__(text)
        self.flight = flight
        self.alert = alert
        self.from_peer = from_peer
        self.certificate_error = certificate_error


class TlsStack:
    """One handshake, made by ``secure_element.tls_stacks``. After an error it is of no use any more."""

    def __init__(
        self,
        context: SSL.Context,
        parameters: TlsParameters,
        *,
        reference_time: float,
        send_time: bool,
        offered: ClientSession | None,
        keep_session: Callable[[ClientSession], None] | None,
        monotonic: Callable[[], float],
    ) -> None:
        self.parameters = parameters
        self._reference_time = reference_time
        self._offered = offered
        self._keep_session = keep_session
        self._monotonic = monotonic
        self._secrets: dict[bytes, bytes] = {}
        self._hello = ServerHelloWatcher()
        self._partial = bytearray()
        self._surplus = bytearray()
        self._unused = self._max_fragment = 0
        self._read_protected = 0
        self._done = False
        self._resumed = False
        self._chain: tuple[bytes, ...] = ()
        self._window = (0.0, 0.0)
        self._write_sequence = 0
        self._alert: tuple[int, bool] | None = None
        self._certificate_error = 0
        self._connection = self._connect(context, send_time=send_time)

    def _connect(self, context: SSL.Context, *, send_time: bool) -> SSL.Connection:
        connection = SSL.Connection(context, None)
        connection.set_app_data(self)
        connection.set_info_callback(_note_alert)
        if self.parameters.role == "server":
            connection.set_accept_state()
            return connection
        connection.set_connect_state()
        if send_time:
            openssl_private.send_time_in_hello(connection)
        if self.parameters.server_name and not _is_address(self.parameters.server_name):
            connection.set_tlsext_host_name(self.parameters.server_name.encode("ascii"))
        if self.parameters.alpn:
            connection.set_alpn_protos([name.encode("ascii") for name in self.parameters.alpn])
        if self._offered is not None and not openssl_private.offer_session(connection, self._offered.session):
            self._offered = None
        return connection

    # -- what the Context's callbacks find (HandshakeOwner) --

    @property
    def reference_time(self) -> float:
        """UTC seconds at which certificates must be valid."""
        return self._reference_time

    def certificate_refused(self, error: int, depth: int) -> None:
        """Remember why: OpenSSL's own error says no more than "certificate verify failed"."""
        self._certificate_error = error

    def choose_alpn(self, offered: list[bytes]) -> bytes | None:
        """The first of our names that the client offers."""
        return next((name for own in self.parameters.alpn if (name := own.encode("ascii")) in offered), None)

    def key_logged(self, line: bytes) -> None:
        """Keep the two application traffic secrets; the others serve nobody."""
        label, _, rest = line.partition(b" ")
        if label in (_CLIENT_SECRET, _SERVER_SECRET):
            self._secrets[label] = bytes.fromhex(rest.partition(b" ")[2].decode("ascii"))

    def alert_seen(self, description: int, *, from_peer: bool) -> None:
        """Remember the last alert."""
        self._alert = (description, from_peer)

    # -- the handshake --

    @property
    def is_done(self) -> bool:
        """Whether the handshake is over and has succeeded."""
        return self._done

    @property
    def is_tls13(self) -> bool:
        """Whether TLS 1.3 was negotiated; only when done."""
        return self._hello.version == TLS_1_3

    def take_surplus(self) -> bytes:
        """Records that were fed behind the end of the handshake. They were not looked at."""
        surplus, self._surplus = bytes(self._surplus), bytearray()
        return surplus

    def start(self) -> bytes:
        """A client's ClientHello; a server has nothing to say first."""
        return self._step() if self.parameters.role == "client" else b""

    def feed(self, untrusted: bytes) -> bytes:
        """Take records of the peer and return those for it, which may be none. Raises TlsHandshakeError."""
        self._partial += untrusted
        output = bytearray()
        while not self._done and (record := self._next_record()):
            if self.parameters.role == "client":
                self._hello.feed(record)
            if record[0] == ContentType.CHANGE_CIPHER_SPEC:
                self._read_protected = 0
            else:
                self._read_protected += 1
            self._connection.bio_write(record)
            output += self._step(bytes(output))
        if self._done:
            self._surplus, self._partial = self._partial, bytearray()
            self._unused = len(self._surplus)
        return bytes(output)

    def _next_record(self) -> bytes:
        """The next whole record, or nothing. What can be no record goes to OpenSSL as it is, which has the alert for it."""
        if len(self._partial) < HEADER_LENGTH:
            return b""
        kind, major, length = self._partial[0], self._partial[1], int.from_bytes(self._partial[3:5])
        if major != 3 or length > MAX_CIPHERTEXT_TLS12 or kind not in _KNOWN_TYPES:
            size = len(self._partial)
        elif len(self._partial) < HEADER_LENGTH + length:
            return b""
        else:
            size = HEADER_LENGTH + length
        record = bytes(self._partial[:size])
        del self._partial[:size]
        return record

    def _step(self, before: bytes = b"") -> bytes:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            output = self._output()
            self._watch(output)
            self._check_resumed()
            return output
        except (SSL.Error, NoApplicationProtocolError) as error:
            raise self._failure(error, before + self._output()) from None
        output = self._output()
        self._watch(output)
        self._check_end_of_record(before + output)
        self._finish(output)
        return output

    def _check_end_of_record(self, flight: bytes) -> None:
        """A message behind the Finished, in the same record, would be lost: OpenSSL has it, and the docking host goes on behind the record.

        In TLS 1.3 OpenSSL refuses that itself. Raises TlsHandshakeError.
        """
        if self.is_tls13:
            return
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except SSL.WantReadError:
            answer = self._output()
            if answer:
                raise TlsHandshakeError(
                    "a message behind the Finished", flight=flight + answer, alert=None, from_peer=False
                ) from None
        except SSL.Error as error:
            raise self._failure(error, flight + self._output()) from None

    def _watch(self, output: bytes) -> None:
        if self.parameters.role == "server":
            self._hello.feed(output)

    def _output(self) -> bytes:
        output = bytearray()
        while len(output) < _MAX_OUTPUT:
            try:
                output += self._connection.bio_read(65536)
            except SSL.WantReadError:
                break
        return bytes(output)

    def _failure(self, error: Exception, flight: bytes) -> TlsHandshakeError:
        alert, from_peer = self._alert or (None, False)
        if self._certificate_error:
            reason = f"the peer's certificate is refused: {openssl_private.error_text(self._certificate_error)}"
        else:
            reason = _reason(error)
        return TlsHandshakeError(
            reason,
            flight=b"" if from_peer else flight,
            alert=alert,
            from_peer=from_peer,
            certificate_error=self._certificate_error,
        )

    def _check_resumed(self) -> None:
        """A resumed session brings a certificate that nobody checks again: its validity is ours to check."""
        if self.parameters.role == "server" and openssl_private.was_resumed(self._connection):
            # Nothing was sent yet: the peer expects the alert in clear.
            expired = AlertDescription.CERTIFICATE_EXPIRED
            self._check_validity(self._peer_chain(), encode_record(ContentType.ALERT, Alert.fatal(expired).encode()))

    def _check_validity(self, chain: list[x509.Certificate], flight: bytes = b"") -> None:
        if not chain or not all(is_valid_at(certificate, self._reference_time) for certificate in chain):
            raise TlsHandshakeError(
                "the certificate of a resumed session is not valid now",
                flight=flight,
                alert=AlertDescription.CERTIFICATE_EXPIRED if flight else None,
                from_peer=False,
                certificate_error=openssl_private.CERT_HAS_EXPIRED,
            )

    def _peer_chain(self) -> list[x509.Certificate]:
        """The peer's certificates as they came, leaf first (a server's OpenSSL keeps the leaf apart)."""
        try:
            leaf = self._connection.get_peer_certificate(as_cryptography=True)
            others = self._connection.get_peer_cert_chain(as_cryptography=True) or []
        except ValueError:
            # One that is not needed for the verified chain: OpenSSL has read its DER, cryptography cannot.
            raise TlsHandshakeError(
                "a certificate of the peer cannot be read", flight=b"", alert=None, from_peer=False
            ) from None
        if leaf is None:
            return []
        return [leaf, *(certificate for certificate in others if certificate != leaf)][:MAX_PEER_CERTIFICATES]

    def _finish(self, output: bytes) -> None:
        self._resumed = openssl_private.was_resumed(self._connection)
        chain = self._peer_chain()
        if self._resumed:
            self._check_validity(chain)
        if self._hello.suite not in SUITES or not chain:
            # Neither can happen with a Context of ours; to go on would be to hand over keys of an unknown meaning.
            raise TlsHandshakeError("the outcome is not one we asked for", flight=b"", alert=None, from_peer=False)
        self._done = True
        self._max_fragment = openssl_private.max_fragment_length(self._connection)
        self._chain = tuple(certificate.public_bytes(Encoding.DER) for certificate in chain)
        if self._resumed and self._offered is not None:
            self._chain = self._offered.chain
            self._window = (self._offered.not_before, self._offered.not_after)
        else:
            verified = self._connection.get_verified_chain(as_cryptography=True) or chain
            self._window = (
                max(certificate.not_valid_before_utc.timestamp() for certificate in verified),
                min(certificate.not_valid_after_utc.timestamp() for certificate in verified),
            )
        # In TLS 1.3 a server's tickets are already under the application keys, one record each; in TLS 1.2 the Finished was number 0.
        self._write_sequence = 1
        if self.is_tls13:
            self._write_sequence = _count_protected(output) if self.parameters.role == "server" else 0
        if not self.is_tls13:
            self._remember_session()
        elif self._resumed and self._offered is not None and self._keep_session is not None:
            self._keep_session(self._offered)

    def _remember_session(self) -> None:
        """Keep the session for the next handshake. Its age counts from the full handshake in which the peer was authenticated."""
        session = None if self._keep_session is None else openssl_private.session_bytes(self._connection)
        if session is None or self._keep_session is None:
            return
        made_at = self._offered.made_at if self._resumed and self._offered is not None else self._monotonic()
        self._keep_session(ClientSession(session, self._chain, *self._window, made_at))

    # -- what the handshake gave; all of it only when it is done --

    @property
    def negotiated(self) -> NegotiatedTls:
        """Version, suite and where the docking host goes on. In TLS 1.2 our Finished was number 0, and so was the peer's first record."""
        return NegotiatedTls(
            version=self._hello.version,
            suite=self._hello.suite,
            encrypt_then_mac=self._hello.encrypt_then_mac,
            resumed=self._resumed,
            read_sequence=0 if self.is_tls13 else self._read_protected,
            write_sequence=self._write_sequence,
            alpn=self._connection.get_alpn_proto_negotiated().decode("ascii", "replace"),
            unused=self._unused if self.parameters.report else None,
            max_fragment=self._max_fragment if self.parameters.report else None,
        )

    @property
    def peer_certificates(self) -> tuple[bytes, ...]:
        """The peer's chain as it came, DER, leaf first; at most 16."""
        return self._chain

    def key_block(self) -> bytes:
        """TLS 1.2: the key block of RFC 5246, 6.3, as long as the suite needs. TLS 1.3: client's and server's application traffic
        secret 0, in this order."""
        if self.is_tls13:
            return self._secrets[_CLIENT_SECRET] + self._secrets[_SERVER_SECRET]
        master = self._connection.master_key()
        client_random, server_random = self.randoms()
        if master is None:
            raise TlsHandshakeError("there is no master secret", flight=b"", alert=None, from_peer=False)
        return key_block_tls12(SUITES[self._hello.suite], master, client_random, server_random)

    def randoms(self) -> tuple[bytes, bytes]:
        """ClientHello.random and ServerHello.random."""
        client_random, server_random = self._connection.client_random(), self._connection.server_random()
        if client_random is None or server_random is None:
            raise TlsHandshakeError("there are no randoms", flight=b"", alert=None, from_peer=False)
        return client_random, server_random

    def export(self, label: bytes, length: int, context: bytes | None) -> bytes:
        """Keying material exporter (RFC 5705; RFC 8446, 7.5). In TLS 1.2 no context and an empty one differ."""
        return self._connection.export_keying_material(label, length, context)

    def take_tickets(self, untrusted: bytes) -> bytes:
        """A client of TLS 1.3 reads records under the application keys, in order from the first: NewSessionTickets, which are kept for
        resumption, and application data, which is returned. Raises TlsHandshakeError for anything else."""
        data = bytearray()
        self._partial += untrusted
        while record := self._next_record():
            self._connection.bio_write(record)
            try:
                while True:
                    data += self._connection.recv(16384)
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                raise self._failure(error, self._output()) from None
        if self._output():
            # An answer (to a KeyUpdate) would take sequence numbers that are the docking host's by now.
            raise TlsHandshakeError("a record asks for an answer", flight=b"", alert=None, from_peer=False)
        self._remember_session()
        return bytes(data)

    def protect(self, data: bytes) -> bytes:
        """Records that carry application data under the keys of the handshake; they take sequence numbers."""
        self._connection.sendall(data)
        output = self._output()
        self._write_sequence += _count_protected(output)
        return output

    def close(self) -> None:
        """Let go of keys and buffers."""
        self._secrets.clear()
        with contextlib.suppress(AttributeError):
            if self._done:
                # Otherwise OpenSSL takes the session for a broken one and throws it out of the server's cache.
                self._connection.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
            self._connection.set_app_data(None)
            del self._connection


_KNOWN_TYPES: Final = frozenset(int(kind) for kind in ContentType)


def _note_alert(connection: SSL.Connection, where: int, value: int) -> None:
    owner = connection.get_app_data()
    if owner is None:
        return
    if where in (_ALERT_SENT, _ALERT_RECEIVED):
        owner.alert_seen(value & 0xFF, from_peer=where == _ALERT_RECEIVED)


def _reason(error: Exception) -> str:
    """OpenSSL's own words for the first error of its queue."""
    if isinstance(error, NoApplicationProtocolError):
        return str(error)
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return str(queue[0][2]) if queue else type(error).__name__


def _count_protected(output: bytes) -> int:
    count, offset = 0, 0
    while offset + HEADER_LENGTH <= len(output):
        count += output[offset] == ContentType.APPLICATION_DATA
        offset += HEADER_LENGTH + int.from_bytes(output[offset + 3 : offset + 5])
    return count


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
