"""What goes wrong in TLS, with the alert that tells the peer."""

from secfunet.errors import SecFuNetError
from secfunet.tls.alerts import AlertDescription


class TlsError(SecFuNetError):
    """Root of all errors of this room."""


class TlsProtocolError(TlsError):
    """The peer broke the protocol. The connection is over; ``alert`` is what the peer is told (RFC 8446, 6.2)."""

    def __init__(self, message: str, alert: AlertDescription) -> None:
        super().__init__(message)
        self.alert = alert


class RecordError(TlsProtocolError):
    """A record's header is malformed, or its length is out of bounds (RFC 8446, 5.1 and 5.2)."""


class BadRecordMacError(TlsProtocolError):
    """A record could not be opened: altered, replayed, out of order or under another key. One error for every cause."""

    def __init__(self) -> None:
        super().__init__("a record is not authentic", AlertDescription.BAD_RECORD_MAC)


class PeerAlertError(TlsError):
    """The peer ended the connection with a fatal alert."""

    def __init__(self, description: int) -> None:
        self.description = AlertDescription.lookup(description)
        self.number = description
        super().__init__(f"the peer ended the connection: {AlertDescription.name_of(description)}")


class TruncatedStreamError(TlsError, ConnectionError):
    """The connection ended without close_notify: what was received may not be all (RFC 8446, 6.1).

    It is also a :class:`ConnectionError`, because asyncio's callers expect one.
    """

    def __init__(self, where: str) -> None:
        super().__init__(f"the peer closed the connection without close_notify {where}")


class KeyUsageLimitError(TlsError):
    """The write key has protected as many records as it may, and this protocol version cannot change it."""


class UnsupportedSuiteError(TlsError):
    """A cipher suite that is unknown here, or that is not allowed by configuration."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"cipher suite {number:#06x} {reason}")
        self.number = number


class ServerNameError(TlsError):
    """The server's certificate does not name the server that was meant (RFC 9525)."""

    def __init__(self, expected: str, reason: str) -> None:
        super().__init__(f"the server's certificate is not for {expected!r}: {reason}")
        self.expected = expected
