"""What can go wrong between a program and its card (status words that a card answers are errors of ``secfunet.apdu``)."""

from __future__ import annotations

from secfunet.errors import SecFuNetError


class CardError(SecFuNetError):
    """Root of the errors of reaching a card."""


class CardGoneError(CardError):
    """The card cannot be reached, or the connection to it was lost; what it held in volatile memory is lost too."""


class CardBusyError(CardError):
    """The card serves somebody else, or did not become free in time: try again later."""


class CardFormatError(CardError):
    """Bytes from or for a card are not what their format says."""


class LeaseEndedError(CardError):
    """A client was used after its lease had ended: a fault of the caller."""
