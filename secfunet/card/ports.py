"""The one thing that every way to a card has in common: it carries command APDUs there and response APDUs back."""

from __future__ import annotations

from typing import Protocol


class CardPort(Protocol):
    """One exclusive connection to one card. Commands are carried one after another, in the order of the calls.

    Every method raises CardGoneError once the connection is lost. A cancelled call does not stop the card: its answer is awaited and
    dropped before the next command is sent.
    """

    async def transmit(self, command: bytes) -> bytes:
        """Sends one command APDU and returns the response APDU."""
        ...

    async def reset(self) -> bytes:
        """Resets the card (warm) and returns its answer to reset (ATR): all that it held in volatile memory is gone."""
        ...

    async def close(self) -> None:
        """Powers the card off and gives it back. Does nothing if that has already happened."""
        ...
