"""The core of TLS-Tandem: one connection, either role, without IO.

It stands between two parties and talks to both in turn. What it wants done comes out of :meth:`TandemConnection.next_command`
(questions for the card) and :meth:`TandemConnection.take_output` (bytes for the peer); what happened goes in through the other methods.

========== ============================== ===================================================================
state      waits for                      leaves it
========== ============================== ===================================================================
IDLE       start()                        client: WAIT_CARD (StartCard); server: WAIT_PEER
WAIT_PEER  received()                     a whole flight: WAIT_CARD (AskCard)
WAIT_CARD  card_answered(flight)          more flights due: WAIT_PEER; the last one: WAIT_KEYS (TakeKeys);
                                          nothing to say, and only the card can tell: WAIT_STATE (AskState)
WAIT_STATE card_state(authenticated)      True: WAIT_KEYS (TakeKeys); False: WAIT_PEER
WAIT_KEYS  card_keys(...)                 the peer is who it must be: OPEN
OPEN       :attr:`stream` has taken over
FAILED     any error, from any state
========== ============================== ===================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator

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
from secfunet.tls.records import ContentType, RecordBuffer, encode_record, split_records
from secfunet.tls.server_names import verify_server_name
from secfunet.tls.stream import HandOver, ProtectedStream


@dataclasses.dataclass(frozen=True)
class StartCard:
    """Reset the card's state, set the TLS parameters, and (client) let it make a ClientHello: answer with card_answered()."""


@dataclasses.dataclass(frozen=True)
class AskCard:
    """Give the card a flight of the peer: answer with card_answered(). ``is_first`` in the server role: the parameters come before."""

    flight: bytes
    is_first: bool = False


@dataclasses.dataclass(frozen=True)
class AskState:
    """Ask the card whether the handshake is over: answer with card_state()."""


@dataclasses.dataclass(frozen=True)
class TakeKeys:
    """Fetch cipher suite, key block and the peer's certificates: answer with card_keys()."""


Command = StartCard | AskCard | AskState | TakeKeys


class TandemState(enum.Enum):
    """See the module's table."""

    IDLE = enum.auto()
    WAIT_PEER = enum.auto()
    WAIT_CARD = enum.auto()
    WAIT_STATE = enum.auto()
    WAIT_KEYS = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()


class TandemConnection:
    """One connection. After any exception it is dead: send :meth:`take_output` (the alert, if one is due), and close."""

    def __init__(self, role: Role, parameters: TandemParameters, *, server_name: str = "") -> None:
        """``server_name`` is required of a client: the DNS name or IP address that the server's certificate must name."""
        if role == "client" and not server_name:
            raise WrongTurnError("a client must say which server it means")
        self.role: Role = role
        self.parameters = parameters
        self.server_name = server_name
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

    @property
    def stream(self) -> ProtectedStream:
        """The connection after its handshake. Raises WrongTurnError before."""
        if self._stream is None:
            raise WrongTurnError("the handshake is not over")
        return self._stream

    def next_command(self) -> Command | None:
        """Return, once, what the card is to be asked; None when nothing is to be asked now."""
        command, self._command = self._command, None
        return command

    def take_output(self) -> bytes:
        """Return, once, what the peer is to be sent. Before OPEN only: afterwards the stream has its own."""
        output, self._output = bytes(self._output), bytearray()
        self._sent |= bool(output)
        return output

    def start(self) -> None:
        """Begin. A client's card is asked for its ClientHello; a server waits for one."""
        self._expect(TandemState.IDLE)
        if self.role == "client":
            self._ask(StartCard())
        else:
            self.state = TandemState.WAIT_PEER

    def received(self) -> None:
        """Look at what the network brought. In states where the peer's turn has not come it waits in the buffer.

        Raises TlsProtocolError, PeerAlertError, UnsupportedSuiteError.
        """
        if self.state is TandemState.WAIT_PEER:
            self._look(at_eof=False)

    def received_eof(self) -> None:
        """Say that the peer has closed. Raises TruncatedStreamError, unless the card still has something to look at."""
        if self.state is TandemState.OPEN:
            self.stream.receive_eof()
        elif self.state is TandemState.WAIT_PEER:
            self._look(at_eof=True)
            if self.state is TandemState.WAIT_PEER:
                self.state = TandemState.FAILED
                raise TruncatedStreamError("in the handshake")

    def card_answered(self, flight: bytes) -> None:
        """Say what the card wants sent: whole records, or nothing. Raises TlsProtocolError when they are not."""
        self._expect(TandemState.WAIT_CARD)
        was_decided = self._flights.version is not None
        with self._failing():
            self._own_flight(flight)
            if not was_decided:
                self._await_peer(flight)
            elif self._flights.version == TLS_1_3:
                self._encrypted_answer(flight)
            elif self._flights.is_certain:
                self._take_keys()
            else:
                self._await_peer(flight)

    def card_state(self, *, is_authenticated: bool) -> None:
        """Say whether the card is satisfied."""
        self._expect(TandemState.WAIT_STATE)
        if is_authenticated:
            self._take_keys()
        else:
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
                suite, key_block, negotiated.read_sequence, negotiated.write_sequence, negotiated.encrypt_then_mac
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
            if negotiated.alpn and negotiated.alpn not in self.parameters.alpn:
                raise TlsProtocolError(
                    "an application protocol that nobody offered", AlertDescription.ILLEGAL_PARAMETER
                )
            self._check_peer(peer_certificates)
        self.negotiated, self.suite, self.peer_certificates = negotiated, suite, peer_certificates
        self.state = TandemState.OPEN

    def fail(self, description: AlertDescription) -> None:
        """Give up for a reason of our own (the card is gone, time is over): the peer is told by an alert."""
        self.state = TandemState.FAILED
        self._command = None
        if self._stream is not None:
            self._stream.fatal_alert(description)
            self._output += self._stream.take_output()
        elif self._sent or self.role == "server":
            self._output += encode_record(ContentType.ALERT, Alert.fatal(description).encode())

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
            self.state = TandemState.FAILED
            self._command = None
            if error.alert is None:
                self.fail(AlertDescription.INTERNAL_ERROR)
            raise
        except PeerAlertError:
            self.state = TandemState.FAILED
            self._command = None
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

    def _take_keys(self) -> None:
        self._command = TakeKeys()
        self.state = TandemState.WAIT_KEYS

    def _look(self, *, at_eof: bool) -> None:
        with self._failing():
            flight = self._flights.next_flight(self.incoming, at_eof=at_eof)
        if flight is not None:
            self._ask(AskCard(flight, is_first=self.role == "server" and not self._asked))
            self._asked = True

    def _own_flight(self, flight: bytes) -> None:
        """Send what the card says. Its alert in clear is sent too, and ends the handshake."""
        self._output += flight
        for record in split_records(flight):
            if record.kind == ContentType.ALERT and record.length == 2:
                raise HandshakeRefusedError("it does not accept the peer's flight", record.fragment[1])
        self._flights.own_flight(flight)

    def _await_peer(self, flight: bytes) -> None:
        if not flight:
            raise HandshakeRefusedError("it had no answer where one was due")
        self.state = TandemState.WAIT_PEER
        self._look(at_eof=False)

    def _encrypted_answer(self, flight: bytes) -> None:
        """TLS 1.3, behind ServerHello: only the card knows whether the peer's Finished has come."""
        if flight:
            self._take_keys()
        elif self.role == "server":
            # A server that sends no tickets has nothing to say at the end, either.
            self._command = AskState()
            self.state = TandemState.WAIT_STATE
        else:
            self.state = TandemState.WAIT_PEER
            self._look(at_eof=False)

    def _check_peer(self, peer_certificates: tuple[bytes, ...]) -> None:
        if self.role == "client":
            if not peer_certificates:
                raise ServerNameError(self.server_name, "the server showed none")
            verify_server_name(peer_certificates[0], self.server_name)
        if self.parameters.verify_peer is not None:
            self.parameters.verify_peer(peer_certificates)
