"""Who may use a card, and when: one at a time, first come first served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from secfunet.apdu import PinError
from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError, CardGoneError, LeaseEndedError
from secfunet.card.ports import CardPort


class CardPool(Protocol):
    """Cards that can do the same job, leased one at a time."""

    def lease(self, *, timeout: float) -> AbstractAsyncContextManager[CardClient]:
        """A card to use inside the context and not after it. Entering raises CardBusyError if none is free within ``timeout`` seconds."""
        ...


class _LeasedPort:
    """A port that its lease can take away, and that remembers whether the card behind it must be made anew."""

    def __init__(self, port: CardPort) -> None:
        self._port = port
        self._ended = False
        self.is_spent = False

    def end(self) -> None:
        self._ended = True

    async def transmit(self, command: bytes) -> bytes:
        self._check()
        try:
            return await self._port.transmit(command)
        except CardGoneError:
            self.is_spent = True
            raise

    async def reset(self) -> bytes:
        self._check()
        self.is_spent = True  # the next lease needs the PIN and the identity again
        return await self._port.reset()

    async def close(self) -> None:
        self._ended = True

    def _check(self) -> None:
        if self._ended:
            raise LeaseEndedError("the lease of this card has ended")


class SingleCard:
    """A pool of one card behind a first-in-first-out lock.

    ``connect`` returns a client that is ready for work (selected, PIN verified, identity set). It is called when the card is first needed,
    and again after the connection was lost.
    """

    def __init__(self, connect: Callable[[], Awaitable[CardClient]]) -> None:
        self._connect = connect
        self._lock = asyncio.Lock()
        self._client: CardClient | None = None
        self._wrong_pin: PinError | None = None

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
        """See CardPool.lease; entering raises what ``connect`` raises, too.

        A PIN that the card has refused once is not tried again, or the card would soon be blocked: the same PinError is raised until
        ``close``.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._lock.acquire()
                try:
                    if self._client is None:
                        self._client = await self._connect_once()
                except BaseException:
                    self._lock.release()
                    raise
        except TimeoutError:
            raise CardBusyError(f"the card did not become free within {timeout:g} s") from None
        client = self._client
        port = _LeasedPort(client.port)
        try:
            yield CardClient(port, segmentation=client.segmentation)
        finally:
            port.end()
            try:
                if port.is_spent:
                    self._client = None
                    await client.close()
            finally:
                self._lock.release()

    async def _connect_once(self) -> CardClient:
        if self._wrong_pin is not None:
            raise PinError(self._wrong_pin.sw, self._wrong_pin.ins, self._wrong_pin.attempts_remaining)
        try:
            return await self._connect()
        except PinError as error:
            self._wrong_pin = error
            raise

    async def close(self) -> None:
        """Waits for the lease that is out, then gives the card back; a later lease connects again."""
        async with self._lock:
            self._wrong_pin = None
            client, self._client = self._client, None
            if client is not None:
                await client.close()
