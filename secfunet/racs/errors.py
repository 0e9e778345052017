"""What can go wrong between the two ends of RACS."""

from __future__ import annotations

from secfunet.errors import SecFuNetError


class RacsError(SecFuNetError):
    """Root of the errors of RACS."""


class RacsProtocolError(RacsError):
    """The peer does not keep to the protocol, so the connection is to be closed; ``answer`` is what a server sends before it does."""

    def __init__(self, message: str, answer: bytes = b"") -> None:
        super().__init__(message)
        self.answer = answer


class RacsValueError(RacsError):
    """A value of ours that RACS cannot carry: a fault of the caller, or of the settings."""


class RacsRefusedError(RacsError):
    """The server did not do a command; ``code`` is the three digits of its status (draft, 2.4), such as 606."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(
            f"the RACS server answered -{code:03d}: {text}" if text else f"the RACS server answered -{code:03d}"
        )
        self.code = code
        self.text = text
