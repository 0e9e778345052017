"""One table: what a card or its slot says, and what the caller of the operation is told."""

from __future__ import annotations

from typing import Final

from gose.errors import Reason, Refusal
from gose.slots.errors import CardUnavailableError, SlotBusyError, SlotClosedError, SlotDeadlineError
from secfunet.apdu import StatusError

# ISO 7816-4, 5.1.3, as our cards use it for the operations of a key pair.
STATUS_WORDS: Final[dict[int, tuple[Reason, str]]] = {
    0x6700: (Reason.OPERATION_INVALID, "the length does not fit the key"),
    0x6982: (Reason.CARD_UNAVAILABLE, "the card has lost its PIN; it is prepared again"),
    0x6983: (Reason.CARD_UNAVAILABLE, "the card's PIN is blocked"),
    0x6985: (Reason.CARD_UNAVAILABLE, "the card is not ready; it is prepared again"),
    0x6A80: (Reason.OPERATION_INVALID, "the card cannot do this with the data"),
    0x6A81: (Reason.OPERATION_INVALID, "the card's key cannot do this"),
    0x6A86: (Reason.OPERATION_INVALID, "the card does not know this scheme"),
    0x6A88: (Reason.CARD_UNAVAILABLE, "the card has no such key; it is prepared again"),
    0x6D00: (Reason.OPERATION_INVALID, "the card does not know this operation"),
}

RECONNECT_AFTER: Final = 0.5  # seconds: a hint for callers whose card is prepared again


def refusal_of(error: Exception) -> Refusal:
    """What ``error`` (SlotError, ApduError, CardError, OSError) means for an operation."""
    match error:
        case SlotBusyError():
            return Refusal(
                Reason.SLOT_BUSY,
                "too many operations wait for the VM's card",
                retry_after=error.retry_after,
                detail=str(error),
            )
        case SlotDeadlineError():
            return Refusal(Reason.DEADLINE_EXCEEDED, "the VM's card was not free in time", detail=str(error))
        case SlotClosedError():
            return Refusal(Reason.SHUTTING_DOWN, "the grid shuts down", retry_after=1.0)
        case CardUnavailableError():
            return Refusal(
                Reason.CARD_UNAVAILABLE,
                "the VM's card is out of service",
                retry_after=error.retry_after,
                detail=str(error),
            )
        case StatusError():
            reason, message = STATUS_WORDS.get(error.sw, (Reason.CARD_REFUSED, "the card refused the operation"))
            retry_after = RECONNECT_AFTER if reason is Reason.CARD_UNAVAILABLE else None
            return Refusal(reason, message, retry_after=retry_after, detail=str(error))
        case _:
            return Refusal(
                Reason.CARD_UNAVAILABLE,
                "the VM's card was lost; it is connected again",
                retry_after=RECONNECT_AFTER,
                detail=str(error),
            )
