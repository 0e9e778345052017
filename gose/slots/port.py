"""The slot's own hand on a card: every command is timed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from secfunet.card.errors import CardGoneError
from secfunet.card.ports import CardPort, PipeliningPort

Answer = TypeVar("Answer")


class GuardedPort:
    """A PipeliningPort whose commands take ``timeout`` seconds at most: a card that is silent for longer counts as gone.

    ``is_lost`` says that the connection must be made anew.
    """

    def __init__(self, port: CardPort, *, timeout: float) -> None:
        self._port = port
        self._timeout = timeout
        self._running: deque[asyncio.Timeout] = deque()
        self.is_lost = False

    async def transmit(self, command: bytes) -> bytes:
        """See CardPort.transmit; raises CardGoneError after ``timeout`` seconds, too."""
        return await self._in_time(self._port.transmit(command))

    async def transmit_many(self, commands: Sequence[bytes]) -> list[bytes]:
        """See PipeliningPort.transmit_many. All of them together have the time of one, unless the port below sends them one by one."""
        if isinstance(self._port, PipeliningPort):
            responses = await self._in_time(self._port.transmit_many(commands))
            self.is_lost = self.is_lost or len(responses) < len(commands)
            return responses
        responses = []
        for command in commands:
            try:
                responses.append(await self.transmit(command))
            except CardGoneError:
                if not responses:
                    raise
                break
        return responses

    async def _in_time(self, exchange: Coroutine[Any, Any, Answer]) -> Answer:
        if self.is_lost:
            exchange.close()
            raise CardGoneError("the connection to the card was lost")
        try:
            async with asyncio.timeout(None) as limit:
                self._running.append(limit)
                try:
                    self._time_the_first()
                    return await exchange
                finally:
                    self._running.remove(limit)
                    self._time_the_first()
        except TimeoutError:
            self.is_lost = True
            raise CardGoneError(f"the card did not answer within {self._timeout:g} s") from None
        except OSError as error:
            self.is_lost = True
            raise CardGoneError(str(error)) from error
        except CardGoneError:
            self.is_lost = True
            raise

    def _time_the_first(self) -> None:
        """The time of an exchange begins when the card has answered those before it."""
        if self._running and self._running[0].when() is None:
            self._running[0].reschedule(asyncio.get_running_loop().time() + self._timeout)

    def abandon(self) -> None:
        """The connection is lost: what is under way fails now."""
        self.is_lost = True
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    async def reset(self, *, cold: bool = False) -> bytes:
        """See CardPort.reset. The card is in no state to serve afterwards, so the connection counts as lost."""
        self.is_lost = True
        async with asyncio.timeout(self._timeout):
            return await self._port.reset(cold=cold)

    async def close(self) -> None:
        """Gives the card back."""
        self.is_lost = True
        await self._port.close()
