"""What can go wrong between a RADIUS client and its server."""

from __future__ import annotations

from secfunet.errors import SecFuNetError


class RadiusError(SecFuNetError):
    """Root of the errors of RADIUS."""


class RadiusFormatError(RadiusError):
    """Bytes that are no RADIUS packet, or none that means something here."""


class RadiusSilenceError(RadiusError):
    """No packet of the server's came: it is not there, it does not know this client, or the secret is another one. A server does not
    answer what the shared secret does not sign, and what it signs with another one is not believed: the three look alike.
    """


class RadiusRejectedError(RadiusError):
    """The server has refused the authentication (Access-Reject); it does not say why."""


class PeerRefusedError(RadiusError):
    """The card has refused the server, or what it sent: a certificate of another authority, say, or an expired one."""


class KeysDifferError(RadiusError):
    """Card and server ended with different keys: somebody stands between them, or an accept was not for this authentication."""
