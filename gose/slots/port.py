"""The slot's own hand on a card: every command is timed, and a lease can be taken back."""

from __future__ import annotations

import asyncio

from secfunet.card.errors import CardGoneError, LeaseEndedError
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


class LeasedPort:
    """What a borrower sees of a GuardedPort: it works until ``end``."""

    def __init__(self, port: GuardedPort) -> None:
        self._port = port
        self._ended = False

    def end(self) -> None:
        """From now on every use raises LeaseEndedError."""
        self._ended = True

    async def transmit(self, command: bytes) -> bytes:
        """See CardPort.transmit."""
        self._check()
        return await self._port.transmit(command)

    async def reset(self) -> bytes:
        """See CardPort.reset."""
        self._check()
        return await self._port.reset()

    async def close(self) -> None:
        """Ends the lease for this borrower; the card stays connected."""
        self._ended = True

    def _check(self) -> None:
        if self._ended:
            raise LeaseEndedError("the lease of this card has ended")
