"""The one thing that every way to a card has in common: it carries command APDUs there and response APDUs back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class CardPort(Protocol):
    """One exclusive connection to one card. Commands are carried one after another, in the order of the calls; the next one may be on its
    way before the last is answered.

    Every method raises CardGoneError once the connection is lost. A cancelled call does not stop the card: its answer is awaited and
    dropped before the next command is sent.
    """

    async def transmit(self, command: bytes) -> bytes:
        """Sends one command APDU and returns the response APDU."""
        ...

    async def reset(self, *, cold: bool = False) -> bytes:
        """Resets the card (``cold``: its power goes and comes back) and returns its answer to reset (ATR): all that it held in volatile
        memory is gone.
        """
        ...

    async def close(self) -> None:
        """Powers the card off and gives it back. Does nothing if that has already happened."""
        ...


@runtime_checkable
class PipeliningPort(CardPort, Protocol):
    """A port to a card that may be sent its next commands before it has answered the first: no round trip between two of them."""

    async def transmit_many(self, commands: Sequence[bytes]) -> list[bytes]:
        """Sends all of them at once; the card takes them one after another. The answers are in the order of the commands.

        They are fewer than the commands if the connection was lost after the first of them came.
        """
        ...
