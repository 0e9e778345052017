"""TLS alerts: the IANA registry, and the codec of the two-byte message (RFC 8446, 6)."""

from __future__ import annotations

import dataclasses
import enum


class AlertLevel(enum.IntEnum):
    """The first byte of an alert. TLS 1.3 ignores it; TLS 1.2 continues after a warning."""

    WARNING = 1
    FATAL = 2


class AlertDescription(enum.IntEnum):
    """The second byte of an alert (IANA "TLS Alerts")."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    DECRYPTION_FAILED = 21
    RECORD_OVERFLOW = 22
    DECOMPRESSION_FAILURE = 30
    HANDSHAKE_FAILURE = 40
    NO_CERTIFICATE = 41
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    EXPORT_RESTRICTION = 60
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    INAPPROPRIATE_FALLBACK = 86
    USER_CANCELED = 90
    NO_RENEGOTIATION = 100
    MISSING_EXTENSION = 109
    UNSUPPORTED_EXTENSION = 110
    CERTIFICATE_UNOBTAINABLE = 111
    UNRECOGNIZED_NAME = 112
    BAD_CERTIFICATE_STATUS_RESPONSE = 113
    BAD_CERTIFICATE_HASH_VALUE = 114
    UNKNOWN_PSK_IDENTITY = 115
    CERTIFICATE_REQUIRED = 116
    GENERAL_ERROR = 117
    NO_APPLICATION_PROTOCOL = 120
    ECH_REQUIRED = 121

    @classmethod
    def lookup(cls, number: int) -> AlertDescription | None:
        """Return the registered description, or None for a number that nobody has registered."""
        try:
            return cls(number)
        except ValueError:
            return None

    @classmethod
    def name_of(cls, number: int) -> str:
        """Return the description as people write it, for example ``bad_record_mac``; any number gives a text."""
        known = cls.lookup(number)
        return f"alert {number}" if known is None else known.name.lower()


@dataclasses.dataclass(frozen=True, slots=True)
class Alert:
    """One alert. Numbers that nobody registered are kept as they came: a peer may be newer than we are."""

    level: int
    description: int

    @property
    def is_close_notify(self) -> bool:
        """Whether this is the orderly end of the peer's stream."""
        return self.description == AlertDescription.CLOSE_NOTIFY

    @property
    def is_fatal(self) -> bool:
        """Whether the level says fatal."""
        return self.level == AlertLevel.FATAL

    def encode(self) -> bytes:
        """Return the two bytes of the message."""
        return bytes((self.level, self.description))

    @classmethod
    def fatal(cls, description: AlertDescription) -> Alert:
        """Return the alert that ends a connection."""
        return cls(AlertLevel.FATAL, description)

    @classmethod
    def warning(cls, description: AlertDescription) -> Alert:
        """Return an alert of level warning (close_notify, no_renegotiation)."""
        return cls(AlertLevel.WARNING, description)
