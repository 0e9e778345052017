"""How the EAP engine says no. Each error has the status word that the card answers."""

from __future__ import annotations

from typing import ClassVar

from secure_element.errors import SecureElementError, Sw


class EapEngineError(SecureElementError):
    """Root of what the engine raises on purpose."""

    sw: ClassVar[int] = Sw.AUTHENTICATION_FAILED


class EapDiscarded(EapEngineError):
    """The packet is silently discarded (RFC 3748, 4 and 4.1); nothing has changed."""

    sw = Sw.DISCARDED


class EapFailure(EapEngineError):
    """The authentication has failed; the state is NOT-AUTHENTICATED. ``alert`` is the TLS alert that was sent or received, if any."""

    def __init__(self, message: str, *, alert: int | None = None) -> None:
        super().__init__(message)
        self.alert = alert


class EapNotReady(EapFailure):
    """A result is asked for that there is not: wrong state, or already given out. Nothing has changed."""

    sw = Sw.CONDITIONS_NOT_SATISFIED


class EapParametersRefused(EapFailure):
    """The TLS parameters ask for what this card does not do. Nothing has changed."""

    sw = Sw.WRONG_DATA
