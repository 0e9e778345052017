"""The core of TLS-Tandem: one connection, either role, without IO.

It stands between two parties and talks to both in turn. What it wants done comes out of :meth:`TandemConnection.next_command`
(questions for the card) and :meth:`TandemConnection.take_output` (bytes for the peer); what happened goes in through the other methods.

========== ============================== ===================================================================
state      waits for                      leaves it
========== ============================== ===================================================================
IDLE       start()                        client: WAIT_CARD (StartCard); server: WAIT_PEER
WAIT_PEER  received()                     something for the card: WAIT_CARD (AskCard)
WAIT_CARD  card_answered(flight)          more is due from the peer: WAIT_PEER; perhaps not: WAIT_KEYS (TakeKeys)
WAIT_KEYS  card_keys(...)                 the peer is who it must be: OPEN
           card_waits()                   the peer's last flight was not whole: WAIT_PEER
OPEN       :attr:`stream` has taken over
FAILED     any error, from any state
========== ============================== ===================================================================

Bytes that come out of turn wait in the buffer, and so does the end of the bytes: received_eof() may come in any state, and ends the
handshake as soon as nothing that came before it can complete it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator
from typing import Final

from secfunet.card.parameters import NegotiatedTls
from secfunet.tandem.errors import HandshakeRefusedError, WrongTurnError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.alerts import Alert, AlertDescription
from secfunet.tls.cipher_suites import TLS_1_3, CipherSuite, suite_of
from secfunet.tls.errors import (
    PeerAlertError,
    ServerNameError,
    TlsError,
    TlsProtocolError,
    TruncatedStreamError,
    UnsupportedSuiteError,
)
from secfunet.tls.flights import FlightDetector, Role
from secfunet.tls.records import (
    HEADER_LENGTH,
    MAX_PLAINTEXT,
    ContentType,
    RecordBuffer,
    encode_record,
    split_records,
)
from secfunet.tls.server_names import verify_server_name
from secfunet.tls.stream import HandOver, ProtectedStream

_ALERT_CONTENT: Final = 2
_CLEAR_ALERT: Final = HEADER_LENGTH + _ALERT_CONTENT


@dataclasses.dataclass(frozen=True)
class StartCard:
    """Reset the card's state, set the TLS parameters, and (client) let it make a ClientHello: answer with card_answered()."""


@dataclasses.dataclass(frozen=True)
class AskCard:
    """Give the card a flight of the peer: answer with card_answered(). ``is_first`` in the server role: the parameters come before."""

    flight: bytes
    is_first: bool = False


@dataclasses.dataclass(frozen=True)
class TakeKeys:
    """Fetch cipher suite, key block and the peer's certificates: answer with card_keys(), or card_waits() if the card's handshake is not
    over."""


Command = StartCard | AskCard | TakeKeys


class TandemState(enum.Enum):
    """See the module's table."""

    IDLE = enum.auto()
    WAIT_PEER = enum.auto()
    WAIT_CARD = enum.auto()
    WAIT_KEYS = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()


class TandemConnection:
    """One connection. After any exception it is dead: send :meth:`take_output` (the alert, if one is due), and close."""

    def __init__(
        self, role: Role, parameters: TandemParameters, *, server_name: str = "", server_port: int = 0
    ) -> None:
        """``server_name`` is required of a client: the DNS name or IP address that the server's certificate must name. ``server_port``
        tells apart the servers of one name whose sessions are resumed; 0 if it is not known."""
        if role == "client" and not server_name:
            raise WrongTurnError("a client must say which server it means")
        self.role: Role = role
        self.parameters = parameters
        self.server_name = server_name
        self.server_port = server_port
        self.state = TandemState.IDLE
        self.incoming = RecordBuffer()
        """Where the caller puts bytes of the network (writable() and wrote(), or feed())."""
        self.negotiated: NegotiatedTls | None = None
        self.suite: CipherSuite | None = None
        self.peer_certificates: tuple[bytes, ...] = ()
        self._stream: ProtectedStream | None = None
        self._flights = FlightDetector(role)
        self._command: Command | None = None
        self._output = bytearray()
        self._asked = False
        self._sent = False
        self._has_changed_cipher = False
        self.has_ended = False
        """Whether the peer has closed: nothing comes behind what is in :attr:`incoming`."""

    @property
    def stream(self) -> ProtectedStream:
        """The connection after its handshake. Raises WrongTurnError before."""
        if self._stream is None:
            raise WrongTurnError("the handshake is not over")
        return self._stream

    def next_command(self) -> Command | None:
        """Return, once, what the card is to be asked; None when nothing is to be asked now."""
        if self.asks_about_open_flight:
            self._look()
        command, self._command = self._command, None
        return command

    @property
    def asks_about_open_flight(self) -> bool:
        """Whether the next command is a question about an encrypted flight: what comes until it is taken goes with it."""
        return isinstance(self._command, AskCard) and self._flights.is_encrypted

    @property
    def seems_whole(self) -> bool:
        """Whether now is a good moment to ask about an encrypted flight: no record is cut short. A hint; nothing depends on it."""
        return self.has_ended or self._flights.seems_whole(self.incoming)

    def take_output(self) -> bytes:
        """Return, once, what the peer is to be sent. Before OPEN only: afterwards the stream has its own."""
        output, self._output = bytes(self._output), bytearray()
        self._sent |= bool(output)
        return output

    def start(self) -> None:
        """Begin. A client's card is asked for its ClientHello; a server waits for one."""
        self._expect(TandemState.IDLE)
        with self._failing():
            if self.has_ended:
                raise TruncatedStreamError("in the handshake")
        if self.role == "client":
            self._ask(StartCard())
        else:
            self.state = TandemState.WAIT_PEER
            self.received()

    def received(self) -> None:
        """Look at what the network brought. In states where the peer's turn has not come it waits in the buffer.

        Raises TlsProtocolError, PeerAlertError, UnsupportedSuiteError, and TruncatedStreamError behind the peer's end.
        """
        if self.state is TandemState.WAIT_PEER:
            with self._failing():
                self._look_or_end()

    def received_eof(self) -> None:
        """Say that the peer has closed, in any state. Raises TruncatedStreamError, unless what came before it may still complete the
        handshake: then that is done first. Once OPEN, it is the stream that is to be told."""
        self.has_ended = True
        if self.state is TandemState.OPEN:
            self.stream.receive_eof()
        elif self.state is TandemState.WAIT_PEER:
            self.received()
        elif self._command is not None and self.state is not TandemState.FAILED:
            with self._failing():
                self._check_end()

    def received_too_much(self) -> None:
        """Say that the buffer is full. Raises TlsProtocolError while a card is waited for: so much cannot be in order before our hello,
        and behind it the peer's end would not be seen."""
        if self._command is not None and not self._flights.is_encrypted and self.state is TandemState.WAIT_CARD:
            with self._failing():
                raise TlsProtocolError("a flood before our hello", AlertDescription.UNEXPECTED_MESSAGE)

    def card_answered(self, flight: bytes, *, reports_unused: bool = False) -> None:
        """Say what the card wants sent: whole records, or nothing. ``reports_unused``: the card says what it did not use, and may be given
        more than the peer's flight. Raises TlsProtocolError when it is no flight, HandshakeRefusedError when it ends the handshake, and
        what received() raises."""
        self._expect(TandemState.WAIT_CARD)
        was_encrypted = self._flights.is_encrypted
        self._flights.reports_unused = reports_unused
        with self._failing():
            self._own_flight(flight)
            if was_encrypted and (flight or self._flights.version != TLS_1_3 or self.role == "server"):
                # A card that has nothing to say may be through, or need more: it says which when it is asked for the keys.
                self._command = TakeKeys()
                self.state = TandemState.WAIT_KEYS
                return
            if not flight and not was_encrypted:
                raise HandshakeRefusedError("it had no answer where one was due")
            self.state = TandemState.WAIT_PEER
            self._look_or_end()

    def card_waits(self) -> None:
        """Say that the card needs more of the peer. Raises what received() raises."""
        self._expect(TandemState.WAIT_KEYS)
        self.state = TandemState.WAIT_PEER
        self.received()

    def card_keys(self, negotiated: NegotiatedTls, key_block: bytes, peer_certificates: tuple[bytes, ...]) -> None:
        """Take over. The peer's certificates (DER, leaf first) are those that the card has verified.

        Raises ServerNameError; UnsupportedSuiteError, TlsError when the card's answers do not fit; what ``verify_peer`` raises.
        """
        self._expect(TandemState.WAIT_KEYS)
        with self._failing():
            hello = self._flights.hello
            if hello is None or (negotiated.version, negotiated.suite) != (hello.version, hello.suite):
                raise TlsError("the card negotiated something else than what was seen on the wire")
            suite = suite_of(negotiated.suite, allow_legacy=self.parameters.allow_legacy)
            hand_over = HandOver(
                suite,
                key_block,
                negotiated.read_sequence,
                negotiated.write_sequence,
                negotiated.encrypt_then_mac,
                negotiated.max_fragment or MAX_PLAINTEXT,
            )
            stream = ProtectedStream(
                self.role,
                hand_over,
                incoming=self.incoming,
                record_limit=self.parameters.record_limit,
                randbytes=self.parameters.randbytes,
            )
            if not self.parameters.resume:
                stream.stop_collecting_tickets()
            # From here on an alert must be encrypted: the stream sends it.
            self._stream = stream
            if self._flights.reports_unused and negotiated.unused is None:
                raise TlsError("the card does not say how much it did not use")
            self._flights.finish(self.incoming, negotiated.unused or 0)
            if negotiated.alpn and negotiated.alpn not in self.parameters.alpn:
                raise TlsProtocolError(
                    "an application protocol that nobody offered", AlertDescription.ILLEGAL_PARAMETER
                )
            self._check_peer(peer_certificates)
        self.negotiated, self.suite, self.peer_certificates = negotiated, suite, peer_certificates
        self.state = TandemState.OPEN

    def fail(self, description: AlertDescription) -> None:
        """Give up for a reason of our own (the card is gone, time is over). The peer is told by an alert, unless that would have to be
        under keys that only the card has, or one was sent before. Does nothing in FAILED."""
        if self.state is TandemState.FAILED:
            return
        self.state = TandemState.FAILED
        self._command = None
        if self._stream is not None:
            self._stream.fatal_alert(description)
            self._output += self._stream.take_output()
        elif not self._is_write_protected and (self._sent or self.role == "server"):
            self._output += encode_record(ContentType.ALERT, Alert.fatal(description).encode())

    def abandon(self) -> None:
        """Give up without a word: the peer has ended the handshake, or was told."""
        self.state = TandemState.FAILED
        self._command = None

    # ---- inside

    def _expect(self, state: TandemState) -> None:
        if self.state is not state:
            raise WrongTurnError(f"this is for {state.name}, and the connection is in {self.state.name}")

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn any error into the end of the connection, with the alert that fits."""
        try:
            yield
        except HandshakeRefusedError as error:
            if error.peer_is_told:
                self.abandon()
            else:
                self.fail(AlertDescription.INTERNAL_ERROR)
            raise
        except (PeerAlertError, TruncatedStreamError):
            self.abandon()
            raise
        except TlsProtocolError as error:
            self.fail(error.alert)
            raise
        except UnsupportedSuiteError:
            self.fail(AlertDescription.ILLEGAL_PARAMETER if self.role == "client" else AlertDescription.INTERNAL_ERROR)
            raise
        except ServerNameError:
            self.fail(AlertDescription.BAD_CERTIFICATE)
            raise
        except TlsError:
            self.fail(AlertDescription.INTERNAL_ERROR)
            raise
        except Exception:
            # verify_peer is the caller's: whatever it raises refuses the peer.
            self.fail(AlertDescription.ACCESS_DENIED)
            raise

    def _ask(self, command: Command) -> None:
        self._command = command
        self.state = TandemState.WAIT_CARD

    def _look(self) -> None:
        """Have the card asked about what has come, if that is something to ask about."""
        is_pending = self._command is not None
        with self._failing():
            find = self._flights.gather if is_pending else self._flights.next_flight
            flight = find(self.incoming)
            if flight is not None:
                is_first = self.role == "server" and not self._asked
                self._asked = True
                self._ask(AskCard(flight, is_first))
                self._check_end()

    def _look_or_end(self) -> None:
        self._look()
        if self.has_ended and self.state is TandemState.WAIT_PEER:
            raise TruncatedStreamError("in the handshake")

    def _check_end(self) -> None:
        """Raise TruncatedStreamError if the peer has closed, and the question that is due cannot complete the handshake."""
        if self.has_ended and not isinstance(self._command, TakeKeys) and not self._flights.is_encrypted:
            raise TruncatedStreamError("in the handshake")

    def _own_flight(self, flight: bytes) -> None:
        """Send what the card says. Its alert is sent too, and ends the handshake, if it can be seen: those of TLS 1.3 are encrypted."""
        if len(flight) == _CLEAR_ALERT and flight[0] == ContentType.ALERT:
            # OpenSSL answers a hello of an impossible version in a record of that version.
            flight = encode_record(ContentType.ALERT, flight[HEADER_LENGTH:])
        records = split_records(flight)
        alert = next((record for record in records if record.kind == ContentType.ALERT), None)
        if alert is not None:
            self._output += flight
            description = alert.fragment[1] if alert.length == _ALERT_CONTENT else None
            raise HandshakeRefusedError("it does not accept the peer's flight", description, peer_is_told=True)
        self._flights.own_flight(flight)
        self._output += flight
        self._has_changed_cipher |= any(record.kind == ContentType.CHANGE_CIPHER_SPEC for record in records)

    @property
    def _is_write_protected(self) -> bool:
        """Whether the peer expects our alerts under keys of the handshake."""
        return self._flights.version == TLS_1_3 or self._has_changed_cipher

    def _check_peer(self, peer_certificates: tuple[bytes, ...]) -> None:
        if self.role == "client":
            if not peer_certificates:
                raise ServerNameError(self.server_name, "the server showed none")
            verify_server_name(peer_certificates[0], self.server_name)
        if self.parameters.verify_peer is not None:
            self.parameters.verify_peer(peer_certificates)
