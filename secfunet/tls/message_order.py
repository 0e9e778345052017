"""Which handshake message of TLS 1.2 may come next from the peer (RFC 5246, 7.3; RFC 5077, 3.1), as OpenSSL has it.

The messages travel in clear, so one that cannot come next is refused at once, without the card. What may or must come follows from what
both sides said before: whether the server announced a ticket or a certificate's status, asked for a certificate, resumes a session.
"""

from __future__ import annotations

from typing import Final

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.errors import TlsProtocolError
from secfunet.tls.handshake import HandshakeType, ServerHello

CHANGE_CIPHER_SPEC: Final = -1
"""Stands among the messages, though it is a record of its own type."""

_NO_CERTIFICATES: Final = b"\0\0\0"

_Due = list[tuple[int, bool]]


class MessageOrder:
    """The messages that are still to come, each with whether it must come. Made by :meth:`of_server` or :meth:`of_client`."""

    def __init__(self, full: _Due, resumed: _Due | None = None) -> None:
        """``resumed``: another order that may be the peer's choice, if its first message is not that of ``full``."""
        self._due = full
        self._instead = resumed
        self._has_certificate = False

    @classmethod
    def of_server(cls, hello: ServerHello, *, has_key_exchange: bool, may_resume: bool) -> MessageOrder:
        """A server's, behind its ServerHello. ``has_key_exchange``: the suite needs a ServerKeyExchange; ``may_resume``: the ServerHello
        repeats the client's session id, which it does when it resumes a session (or, wrongly, at any time)."""
        last: _Due = [(CHANGE_CIPHER_SPEC, True)]
        if hello.announces_ticket:
            last.insert(0, (HandshakeType.NEW_SESSION_TICKET, True))
        full: _Due = [(HandshakeType.CERTIFICATE, True)]
        if hello.announces_status:
            full.append((HandshakeType.CERTIFICATE_STATUS, False))
        if has_key_exchange:
            full.append((HandshakeType.SERVER_KEY_EXCHANGE, True))
        full += [(HandshakeType.CERTIFICATE_REQUEST, False), (HandshakeType.SERVER_HELLO_DONE, True), *last]
        return cls(full, last if may_resume else None)

    @classmethod
    def of_client(cls, server_messages: set[int]) -> MessageOrder:
        """A client's, behind the server's first flight, in which there were ``server_messages``."""
        if CHANGE_CIPHER_SPEC in server_messages:  # the server resumes a session
            return cls([(CHANGE_CIPHER_SPEC, True)])
        full: _Due = [
            (HandshakeType.CLIENT_KEY_EXCHANGE, True),
            (HandshakeType.CERTIFICATE_VERIFY, True),
            (CHANGE_CIPHER_SPEC, True),
        ]
        if HandshakeType.CERTIFICATE_REQUEST in server_messages:
            full.insert(0, (HandshakeType.CERTIFICATE, True))
        return cls(full)

    def take(self, kind: int, body: bytes = b"") -> None:
        """Note a message. Raises TlsProtocolError (unexpected_message) for one that cannot come now."""
        if self._instead is not None:
            if self._due[0][0] != kind:
                self._due = self._instead
            self._instead = None
        for index, (message, must_come) in enumerate(self._due):
            if message == kind:
                self._due = self._due[index + 1 :]
                self._note(kind, body)
                return
            if must_come:
                break
        what = "ChangeCipherSpec" if kind == CHANGE_CIPHER_SPEC else f"handshake message {kind}"
        raise TlsProtocolError(f"{what} out of turn", AlertDescription.UNEXPECTED_MESSAGE)

    def _note(self, kind: int, body: bytes) -> None:
        """A client signs for the certificate that it has shown, and only then."""
        if kind == HandshakeType.CERTIFICATE:
            self._has_certificate = body != _NO_CERTIFICATES
        elif kind == HandshakeType.CLIENT_KEY_EXCHANGE and not self._has_certificate:
            self._due = [due for due in self._due if due[0] != HandshakeType.CERTIFICATE_VERIFY]
