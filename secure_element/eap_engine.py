"""The EAP engine of the card: states, identity, and the choice between peer and server, TLS-Tandem and full EAP. No IO.

States (draft-urien-eap-smartcard, Get-State) and what they take:

- 01 IDENTITY-NOT-SET: nothing; every packet is discarded.
- 04 NOT-AUTHENTICATED (after Set-Identity, and after a failure): EAP-Request/Identity, other requests get a NAK; a server card:
  EAP-Response/Identity.
- 02 AUTHENTICATING (after Reset-State, or the identity): EAP-TLS. After Reset-State it may begin at once, which is docking mode
  (TLS-Tandem): a client card with the Start request, a server card with the response that has the ClientHello.
- 03 AUTHENTICATED: results are there; a docked TLS 1.3 client takes tickets.

EAP-Request/Identity begins anew in 02, 03 and 04, and so does EAP-Response/Identity at a server card.

Time: the four bytes of Unix time that the docking host appends (to the Start, to the ClientHello, or to a packet before them) decide
at which time certificates must be valid; without them it is the process's clock. The time also stands in the first four bytes of the
client's random if the process's clock agrees with it, because OpenSSL puts its own clock there or none; else they are random, as
RFC 8446 wants them anyway.

Keys: RFC 5216, 2.3 (TLS 1.2: PRF over the master secret, by the exporter without context) and RFC 9190, 2.3 (TLS 1.3).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.card.parameters import EapState, NegotiatedTls, TlsParameters
from secfunet.eap import EapCode, EapFormatError, EapPacket, EapType
from secfunet.eap_tls import HEADERS, EapTlsError, EapTlsMessage
from secfunet.service.flood_log import FloodLog
from secure_element.eap_errors import EapDiscarded, EapEngineError, EapFailure, EapNotReady, EapParametersRefused
from secure_element.eap_method import EapTlsMethod
from secure_element.tls_context import TlsIdView, TlsParametersError
from secure_element.tls_stack import TlsHandshakeError
from secure_element.tls_stacks import TlsStacks

__all__ = [
    "EapDiscarded",
    "EapEngine",
    "EapEngineError",
    "EapFailure",
    "EapNotReady",
    "EapParametersRefused",
    "TlsIdView",
]

log = logging.getLogger(__name__)

DOCKING_FRAGMENT: Final = 16384
"""Most TLS bytes in a packet to the docking host: APDUs segment it anyway."""
EAP_FRAGMENT: Final = 1000
"""Most TLS bytes in a packet of full EAP, whose lower layers promise 1020 bytes (RFC 3748, 3.1)."""

_KEY_LABEL: Final = {False: b"client EAP encryption", True: b"EXPORTER_EAP_TLS_Key_Material"}
_METHOD_ID_LABEL: Final = b"EXPORTER_EAP_TLS_Method-Id"
_TYPE: Final = bytes((EapType.TLS,))
SESSION_KEY_LENGTH: Final = 128
"""MSK (64 bytes) and EMSK (64 bytes)."""

PEER_ID, SERVER_ID, METHOD_ID, SESSION_ID, KEY_LIFETIME, CHANNEL_BINDINGS = range(1, 7)
"""Indices of exported parameters."""


class EapEngine:
    """The volatile part of the applet. Whatever ``process`` is given, it answers or raises EapDiscarded or EapFailure."""

    def __init__(
        self,
        *,
        randbytes: Callable[[int], bytes],
        legacy_tls: bool,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        docking_fragment: int = DOCKING_FRAGMENT,
        eap_fragment: int = EAP_FRAGMENT,
    ) -> None:
        self._stacks = TlsStacks(randbytes=randbytes, legacy_tls=legacy_tls, clock=clock, monotonic=monotonic)
        self._log = FloodLog(log, monotonic=monotonic)
        self._docking_fragment = docking_fragment
        self._eap_fragment = eap_fragment
        self._tls_id: TlsIdView | None = None
        self._parameters = TlsParameters()
        self._state = EapState.IDENTITY_NOT_SET
        self._clear()

    def _clear(self) -> None:
        """Forget a running or finished authentication, keys included."""
        method: EapTlsMethod | None = getattr(self, "_method", None)
        if method is not None:
            method.stack.close()
        self._method: EapTlsMethod | None = None
        self._docking = True
        self._unix_time: int | None = None
        self._outstanding: int | None = None
        self._last: tuple[bytes, bytes] | None = None
        self._key_block_given = False
        self._failure_logged = False

    # -- commands --

    def select_identity(self, tls_id: TlsIdView | None) -> None:
        """Set-Identity: state 04, or 01 for None. The TLS parameters are the defaults again. Sessions of other identities are not used."""
        self._clear()
        self._tls_id = tls_id
        self._parameters = TlsParameters()
        self._state = EapState.IDENTITY_NOT_SET if tls_id is None else EapState.NOT_AUTHENTICATED

    def set_parameters(self, parameters: TlsParameters) -> None:
        """Set-TLS-Parameters: holds from the next beginning of a handshake until Set-Identity. Raises EapParametersRefused."""
        try:
            self._stacks.check(parameters)
        except TlsParametersError as error:
            raise EapParametersRefused(str(error)) from None
        self._parameters = parameters

    def reset_state(self) -> None:
        """Reset-State: state 02 with nothing begun; no effect in state 01."""
        if self._state is not EapState.IDENTITY_NOT_SET:
            self._clear()
            self._state = EapState.AUTHENTICATING

    @property
    def state(self) -> EapState:
        """Get-State. A failure counts as soon as the alert is handed out, though it is raised on the next packet only."""
        if self._method is not None and self._method.has_ended_in_failure:
            return EapState.NOT_AUTHENTICATED
        return self._state

    def process(self, untrusted: bytes, unix_time: int | None = None) -> bytes:
        """Process-EAP: the answer to an EAP packet, or nothing (to EAP-Success). ``unix_time``: UTC seconds from the docking host.

        Raises EapDiscarded, or EapFailure after which the state is 04; a TLS alert that is due was the answer before.
        """
        if self._tls_id is None:
            raise EapDiscarded("no identity is set")
        try:
            packet = EapPacket.decode(untrusted)
        except EapFormatError as error:
            raise EapDiscarded(str(error)) from None
        if unix_time is not None:
            self._unix_time = unix_time
        try:
            answer = self._dispatch(packet, self._tls_id)
        except EapDiscarded:
            raise
        except EapFailure as error:
            self._fail(str(error))
            raise
        except EapTlsError as error:
            self._fail(str(error))
            raise EapFailure(str(error)) from None
        failure = None if self._method is None else self._method.failure
        if failure is not None:
            # The answer is the alert; nobody need come back for the failure.
            self._log_failure(str(failure))
        return answer

    def _log_failure(self, reason: str) -> None:
        """One line for each failure (of one kind at most one a second). The status word says no more than "failed": the reason is for the
        card's own log, and no secret."""
        if not self._failure_logged:
            self._failure_logged = True
            name = "" if self._tls_id is None else self._tls_id.name
            self._log.warning(
                f"{name}: {reason}",
                f"authentication of {name} failed: {reason}",
                {"identity": name, "reason": reason},
            )

    def _fail(self, reason: str) -> None:
        self._log_failure(reason)
        self._clear()
        self._state = EapState.NOT_AUTHENTICATED

    def _dispatch(self, packet: EapPacket, tls_id: TlsIdView) -> bytes:
        is_client = self._parameters.role == "client" if self._method is None else not self._is_server
        match packet.code:
            case EapCode.REQUEST if is_client or packet.type == EapType.IDENTITY:
                return self._request(packet, tls_id)
            case EapCode.RESPONSE if not is_client:
                return self._response(packet, tls_id)
            case EapCode.SUCCESS | EapCode.FAILURE if is_client:
                return self._outcome(packet.code)
        raise EapDiscarded("a packet for the other role")

    @property
    def _is_server(self) -> bool:
        return self._method is not None and self._method.stack.parameters.role == "server"

    # -- the card is the peer (TLS client) --

    def _request(self, packet: EapPacket, tls_id: TlsIdView) -> bytes:
        if packet.type == EapType.IDENTITY:
            if self._parameters.role != "client":
                raise EapDiscarded("a server card is asked for its identity")
            unix_time = self._unix_time
            self._clear()
            self._docking, self._unix_time = False, unix_time
            self._state = EapState.AUTHENTICATING
            return _answer(packet, EapType.IDENTITY, tls_id.eap_id)
        if packet.type == EapType.NOTIFICATION:
            return _answer(packet, EapType.NOTIFICATION, b"")
        if self._state is EapState.NOT_AUTHENTICATED or (packet.type != EapType.TLS and self._method is None):
            return _answer(packet, EapType.NAK, _TYPE)
        if packet.type != EapType.TLS:
            raise EapDiscarded("another method in the middle of EAP-TLS")
        encoded = packet.encode()
        if not self._docking and self._last is not None and self._last[0] == encoded:
            return self._last[1]  # a retransmission gets the same answer (RFC 3748, 4.1)
        answer = _answer(packet, EapType.TLS, self._tls(packet, tls_id).encode())
        self._last = (encoded, answer)
        return answer

    def _tls(self, packet: EapPacket, tls_id: TlsIdView) -> EapTlsMessage:
        message = EapTlsMessage.decode(packet.data)
        if message.start:
            if self._method is not None:
                raise EapDiscarded("a Start in the middle of EAP-TLS")
            self._method = self._begin(tls_id)
            answer: EapTlsMessage | None = self._method.start()
        elif self._method is None:
            raise EapDiscarded("EAP-TLS begins with a Start")
        else:
            answer = self._method.process(message)
        self._advance()
        if answer is None:
            raise EapDiscarded("nothing to answer")
        return answer

    def _outcome(self, code: EapCode) -> bytes:
        """EAP-Success or EAP-Failure. Success before the method is through is no success (RFC 3748, 4.2; RFC 5216, 2.1)."""
        if self._docking or self._state not in (EapState.AUTHENTICATING, EapState.AUTHENTICATED):
            raise EapDiscarded("an outcome of nothing")
        if code == EapCode.FAILURE:
            if self._method is not None and self._method.failure is not None:
                raise self._method.failure
            raise EapFailure("the server refuses the authentication")
        if self._state is not EapState.AUTHENTICATED:
            raise EapDiscarded("a success too early")
        return b""

    # -- the card is the server (TLS server) --

    def _response(self, packet: EapPacket, tls_id: TlsIdView) -> bytes:
        following = (packet.identifier + 1) & 0xFF
        if packet.type == EapType.IDENTITY:
            unix_time = self._unix_time
            self._clear()
            self._docking, self._unix_time, self._outstanding = False, unix_time, following
            self._state = EapState.AUTHENTICATING
            return EapPacket(EapCode.REQUEST, following, EapType.TLS, EapTlsMessage(start=True).encode()).encode()
        if self._state is EapState.NOT_AUTHENTICATED:
            raise EapDiscarded("nothing has begun")
        if not self._docking and packet.identifier != self._outstanding:
            raise EapDiscarded("a response to no request of ours")
        if packet.type != EapType.TLS:
            if packet.type == EapType.NAK and self._method is None and not self._docking:
                self._fail("the peer wants another method")
                return EapPacket(EapCode.FAILURE, packet.identifier).encode()
            raise EapDiscarded("another method than EAP-TLS")
        return self._serve(packet, following, tls_id)

    def _serve(self, packet: EapPacket, following: int, tls_id: TlsIdView) -> bytes:
        message = EapTlsMessage.decode(packet.data)
        docking = self._docking
        try:
            if self._method is None:
                if message.is_ack:
                    raise EapDiscarded("a ClientHello is due")
                self._method = self._begin(tls_id)
            elif self._state is EapState.AUTHENTICATED:
                raise EapDiscarded("the authentication is over")
            answer = self._method.process(message)
        except (EapFailure, EapTlsError) as error:
            if docking:
                raise
            self._fail(str(error))
            return EapPacket(EapCode.FAILURE, packet.identifier).encode()
        if answer is None:
            self._state = EapState.AUTHENTICATED
            return EapPacket(EapCode.SUCCESS, packet.identifier).encode()
        if docking:
            self._advance()
        self._outstanding = following
        return EapPacket(EapCode.REQUEST, following, EapType.TLS, answer.encode()).encode()

    # -- both --

    def _begin(self, tls_id: TlsIdView) -> EapTlsMethod:
        try:
            stack = self._stacks.start(tls_id, self._parameters, self._unix_time)
        except TlsParametersError as error:
            raise EapFailure(str(error)) from None
        return EapTlsMethod(stack, docking=self._docking, fragment_size=self._fragment_size())

    def _fragment_size(self) -> int:
        if self._docking:
            return self._docking_fragment
        mtu = self._parameters.eap_mtu
        return self._eap_fragment if mtu is None else min(self._eap_fragment, mtu - HEADERS)

    def _advance(self) -> None:
        if self._method is not None and self._method.is_complete:
            self._state = EapState.AUTHENTICATED

    # -- results --

    def _authenticated(self) -> EapTlsMethod:
        if self._state is not EapState.AUTHENTICATED or self._method is None:
            raise EapNotReady("there is no successful authentication")
        return self._method

    def session_key(self) -> bytes:
        """MSK ‖ EMSK, 128 bytes (RFC 5216, 2.3; RFC 9190, 2.3). Raises EapNotReady."""
        stack = self._authenticated().stack
        context = _TYPE if stack.is_tls13 else None
        return stack.export(_KEY_LABEL[stack.is_tls13], SESSION_KEY_LENGTH, context)

    def negotiated(self) -> NegotiatedTls:
        """CipherSuite: what the handshake became. Raises EapNotReady."""
        return self._authenticated().stack.negotiated

    def key_block(self) -> bytes:
        """KeyBlock, once a handshake: RFC 5246, 6.3, or both application traffic secrets (client's first). Raises EapNotReady."""
        method = self._authenticated()
        if self._key_block_given:
            raise EapNotReady("the key block was given out")
        try:
            key_block = method.stack.key_block()
        except TlsHandshakeError as error:
            raise EapNotReady(str(error)) from None
        self._key_block_given = True
        return key_block

    def peer_certificates(self) -> tuple[bytes, ...]:
        """The peer's chain, DER, leaf first. Raises EapNotReady."""
        return self._authenticated().stack.peer_certificates

    def exported_parameter(self, index: int) -> bytes:
        """Get-Exported-Parameter (RFC 5216, 5.2 and 2.3; RFC 9190, 2.3): 1 Peer-ID, 2 Server-ID, 3 Method-ID, 4 Session-ID; 5 Key-Lifetime
        and 6 channel bindings are empty, as EAP-TLS exports none. Raises EapNotReady, also for another index."""
        method = self._authenticated()
        own = self._tls_id.certificate.public_bytes(Encoding.DER) if self._tls_id is not None else b""
        peer = method.stack.peer_certificates[0]
        match index:
            case 1 | 2:
                is_own = (index == SERVER_ID) == self._is_server
                return _names_of(own if is_own else peer)
            case 3 | 4:
                method_id = self._method_id(method)
                return method_id if index == METHOD_ID else _TYPE + method_id
            case 5 | 6:
                return b""
        raise EapNotReady(f"there is no exported parameter {index}")

    @staticmethod
    def _method_id(method: EapTlsMethod) -> bytes:
        if method.stack.is_tls13:
            return method.stack.export(_METHOD_ID_LABEL, 64, _TYPE)
        client_random, server_random = method.stack.randoms()
        return client_random + server_random


def _answer(request: EapPacket, kind: int, data: bytes) -> bytes:
    return EapPacket(EapCode.RESPONSE, request.identifier, kind, data).encode()


def _names_of(certificate_der: bytes) -> bytes:
    """The subject as DER; the first name of the subjectAltName, as text, if the subject is empty (RFC 5216, 5.2)."""
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        if certificate.subject.rdns:
            return certificate.subject.public_bytes()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # noqa: BLE001 - the library raises more kinds than it documents, and the peer's is the peer's choice
        return b""
    return next((str(name.value).encode() for name in names), b"")
