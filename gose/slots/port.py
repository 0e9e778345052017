"""The slot's own hand on a card: every command is timed."""

from __future__ import annotations

import asyncio

from secfunet.card.errors import CardGoneError
from secfunet.card.ports import CardPort


class GuardedPort:
    """A CardPort whose commands take ``timeout`` seconds at most: a card that is silent for longer counts as gone.

    ``is_lost`` says that the connection must be made anew.
    """

    def __init__(self, port: CardPort, *, timeout: float) -> None:
        self._port = port
        self._timeout = timeout
        self.is_lost = False

    async def transmit(self, command: bytes) -> bytes:
        """See CardPort.transmit; raises CardGoneError after ``timeout`` seconds, too."""
        if self.is_lost:
            raise CardGoneError("the connection to the card was lost")
        try:
            async with asyncio.timeout(self._timeout):
                return await self._port.transmit(command)
        except TimeoutError:
            self.is_lost = True
            raise CardGoneError(f"the card did not answer within {self._timeout:g} s") from None
        except (CardGoneError, OSError):
            self.is_lost = True
            raise

    async def reset(self) -> bytes:
        """See CardPort.reset. The card is in no state to serve afterwards, so the connection counts as lost."""
        self.is_lost = True
        async with asyncio.timeout(self._timeout):
            return await self._port.reset()

    async def close(self) -> None:
        """Gives the card back."""
        self.is_lost = True
        await self._port.close()
