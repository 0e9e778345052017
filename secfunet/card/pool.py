"""Who may use a card, and when: one at a time, first come first served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError
from secfunet.card.lease import Lease


class CardPool(Protocol):
    """Cards that can do the same job, leased one at a time."""

    def lease(self, *, timeout: float) -> AbstractAsyncContextManager[CardClient]:
        """A card to use inside the context and not after it. Entering raises CardBusyError if none is free within ``timeout`` seconds."""
        ...


class SingleCard:
    """A pool of one card behind a first-in-first-out lock.

    ``connect`` returns a client that is ready for work (``secfunet.card.ready.CardOpener``). It is called when the card is first needed,
    and again after the connection was lost or a lease has left it in no state for another (``secfunet.card.lease``).
    """

    def __init__(self, connect: Callable[[], Awaitable[CardClient]]) -> None:
        self._connect = connect
        self._lock = asyncio.Lock()
        self._client: CardClient | None = None

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
        """See CardPool.lease; entering raises what ``connect`` raises, too."""
        try:
            async with asyncio.timeout(timeout):
                await self._lock.acquire()
                try:
                    if self._client is None:
                        self._client = await self._connect()
                except BaseException:
                    self._lock.release()
                    raise
        except TimeoutError:
            raise CardBusyError(f"the card did not become free within {timeout:g} s") from None
        lease = Lease(self._client)
        try:
            yield lease.client
        finally:
            await self._take_back(lease)

    async def _take_back(self, lease: Lease) -> None:
        is_usable = False
        try:
            is_usable = await lease.end()
        finally:
            client = self._client
            if not is_usable:
                self._client = None
            try:
                if not is_usable and client is not None:
                    await client.close()
            finally:
                self._lock.release()

    async def close(self) -> None:
        """Waits for the lease that is out, then gives the card back; a later lease connects again."""
        async with self._lock:
            client, self._client = self._client, None
            if client is not None:
                await client.close()
