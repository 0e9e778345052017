"""What can be wrong with a secure channel."""

from __future__ import annotations

from secfunet.errors import SecFuNetError


class Scp03Error(SecFuNetError):
    """Root of the errors of SCP03."""


class Scp03FormatError(Scp03Error):
    """Bytes, or a use of the channel, that the protocol does not have."""


class Scp03SecurityError(Scp03Error):
    """A cryptogram, a MAC or a padding is wrong: the channel is over. What exactly was wrong is not told to the other end."""
