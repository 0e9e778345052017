"""What goes wrong with a TLS-Tandem connection, beside what goes wrong in TLS itself."""

from secfunet.errors import SecFuNetError
from secfunet.tls.alerts import AlertDescription


class TandemError(SecFuNetError):
    """Root of all errors of this room."""


class HandshakeRefusedError(TandemError, ConnectionError):
    """The card did not accept the peer, or could not agree with it. ``peer_is_told``: the peer has its alert; ``alert`` is which one, if
    that can be seen (in TLS 1.3 the card encrypts it)."""

    def __init__(self, reason: str, alert: int | None = None, *, peer_is_told: bool = False) -> None:
        told = "" if alert is None else f" ({AlertDescription.name_of(alert)})"
        super().__init__(f"the card ended the TLS handshake{told}: {reason}")
        self.alert = alert
        self.peer_is_told = peer_is_told


class HandshakeTimeoutError(TandemError, TimeoutError):
    """The connection was not ready in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no TLS-Tandem connection within {seconds:g} s")
        self.seconds = seconds


class PeerStalledError(HandshakeTimeoutError):
    """The peer let a leased card wait for more than ``seconds`` in all."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.args = (f"the peer let the card wait for more than {seconds:g} s in the TLS handshake",)


class WrongTurnError(TandemError):
    """The caller of a TandemConnection did something that its state does not allow: a fault of this program."""


class RelayError(TandemError):
    """A relay cannot be offered, or somebody else tried to use it."""
