"""What can go wrong between dom0 and a domain."""

from __future__ import annotations

from secfunet.errors import SecFuNetError


class XenError(SecFuNetError):
    """Xen's xenstore or a channel cannot do this."""


class XenstoreError(XenError):
    """xenstore cannot be reached, or refuses. ``errno``: what it said (0: it was not asked)."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class VchanError(XenError):
    """A channel cannot be made or opened. ``errno`` as above."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class MultiplexError(XenError):
    """The peer of a channel does not keep to the protocol: the channel is to be closed."""


class BudgetError(MultiplexError):
    """The peer of a channel uses it up without doing anything with it: the channel is to be closed, and not made again soon."""
