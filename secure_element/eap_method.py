"""The EAP-TLS method of a card for one authentication: RFC 5216 with TLS 1.2, RFC 9190 with TLS 1.3; either role, two modes.

*Docking* is TLS-Tandem: the EAP packets only carry a TLS handshake between the docking host and the card; there is no identity and no
EAP-Success, and it is over when the last flight was handed out. *Full* is EAP: in TLS 1.3 the server's protected success indication
(one byte 00 of application data, RFC 9190, 2.5) is part of it.

A failure is told to the peer first: the flight with the alert is an ordinary answer, and the failure is raised on the next packet.
"""

from __future__ import annotations

from typing import Final

from secfunet.eap_tls import ACK, Asked, EapTlsChannel, EapTlsMessage
from secure_element.eap_errors import EapDiscarded, EapFailure
from secure_element.tls_stack import TlsHandshakeError, TlsStack

_COMMITMENT: Final = b"\x00"


class EapTlsMethod:
    """One run of the method. ``process`` takes the peer's EAP-TLS packets and gives ours."""

    def __init__(self, stack: TlsStack, *, docking: bool, fragment_size: int) -> None:
        self.stack = stack
        self.docking = docking
        self._is_server = stack.parameters.role == "server"
        self._channel = EapTlsChannel(fragment_size)
        self._committed = docking
        self._failure: TlsHandshakeError | None = None

    @property
    def failure(self) -> EapFailure | None:
        """Why the handshake failed, if it did; the alert may still be on its way."""
        return None if self._failure is None else failure_of(self._failure)

    @property
    def has_ended_in_failure(self) -> bool:
        """Whether it failed, and the alert was handed out."""
        return self._failure is not None and not self._channel.is_sending

    @property
    def is_complete(self) -> bool:
        """Whether it succeeded, and all of ours was handed out."""
        return (
            self._failure is None
            and self.stack.is_done
            and not self._channel.is_sending
            and (self._committed or not self.stack.is_tls13)
        )

    def start(self) -> EapTlsMessage:
        """A client's answer to the Start. Raises EapFailure."""
        try:
            return self._channel.send(self.stack.start())
        except TlsHandshakeError as error:
            raise failure_of(error) from None

    def process(self, message: EapTlsMessage) -> EapTlsMessage | None:
        """The answer to a packet, or None if a server has nothing more to say in this method.

        Raises EapFailure when the handshake has failed and no alert is due (any more), EapDiscarded for a packet that asks for nothing that
        there is, EapTlsError for one that breaks the rules of fragments.
        """
        received = self._channel.receive(message)
        if received is Asked.FRAGMENT:
            return self._channel.next_fragment()
        if self._failure is not None:
            raise failure_of(self._failure)
        if received is Asked.ACK:
            return ACK
        if isinstance(received, bytes):
            return self._behind_handshake(received) if self.stack.is_done else self._flight(received)
        if self._is_server and not self.docking and self.is_complete:
            return None
        raise EapDiscarded("an acknowledgement of nothing")

    def _flight(self, untrusted: bytes) -> EapTlsMessage | None:
        try:
            output = self.stack.feed(untrusted)
            if self.stack.is_done:
                output += self._handshake_done()
        except TlsHandshakeError as error:
            return self._fail(error)
        if output:
            return self._channel.send(output)
        return None if self._is_server and not self.docking and self.is_complete else ACK

    def _fail(self, error: TlsHandshakeError) -> EapTlsMessage:
        """The alert's flight, or what else ends the method: a peer acknowledges the server's alert, so that EAP-Failure can follow
        (RFC 5216, 2.1.3)."""
        self._failure = error
        if error.flight:
            return self._channel.send(error.flight)
        if error.from_peer and not self._is_server and not self.docking:
            return ACK
        raise failure_of(error)

    def _handshake_done(self) -> bytes:
        """The commitment message if it is ours to send; a client may have been sent it together with the last flight."""
        surplus = self.stack.take_surplus()
        if self.docking and self.stack.parameters.report:
            return b""
        if surplus and (self.docking or self._is_server):
            raise EapFailure("records from behind the end of the handshake were given to the card")
        if self.docking or not self.stack.is_tls13:
            return b""
        if self._is_server:
            self._committed = True
            return self.stack.protect(_COMMITMENT)
        self._read_commitment(surplus)
        return b""

    def _behind_handshake(self, untrusted: bytes) -> EapTlsMessage:
        """TLS 1.3 to a client: tickets (docking, as long as the docking host has not begun to use the connection), and the commitment."""
        if self._is_server or not self.stack.is_tls13 or (self._committed and not self.docking):
            raise EapDiscarded("a flight behind the end of the handshake")
        if self.docking:
            try:
                data = self.stack.take_tickets(untrusted)
            except TlsHandshakeError:
                raise EapDiscarded("no ticket that the card can read") from None
            if data:
                raise EapDiscarded("application data is the docking host's")
            return ACK
        try:
            self._read_commitment(untrusted)
        except TlsHandshakeError as error:
            return self._fail(error)
        return ACK

    def _read_commitment(self, untrusted: bytes) -> None:
        data = self.stack.take_tickets(untrusted)
        if data:
            if self._committed or data != _COMMITMENT:
                raise EapFailure("the server's application data is no protected success indication")
            self._committed = True


def failure_of(error: TlsHandshakeError) -> EapFailure:
    """The failure of an authentication, for the caller of the card."""
    return EapFailure(str(error), alert=error.alert)
