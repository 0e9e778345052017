"""The hypervisor's card as this client uses it: leased for moments, its refusals named."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from gose_client.errors import HypervisorCardError
from secfunet.apdu import PinError
from secfunet.card.client import CardClient
from secfunet.card.pool import CardPool


class CarefulCards:
    """A CardPool whose PinError is a HypervisorCardError: whoever makes the pool sees to it that no PIN is tried twice
    (``secfunet.card.ready``)."""

    def __init__(self, pool: CardPool) -> None:
        self._pool = pool
        self._certificate: bytes | None = None

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
        """See CardPool.lease. Raises HypervisorCardError for a PIN that the card does not take."""
        try:
            async with self._pool.lease(timeout=timeout) as card:
                yield card
        except PinError as error:
            raise HypervisorCardError(
                f"the hypervisor's card does not take the PIN: {error}; attempts left: {error.attempts_remaining}"
            ) from error

    async def certificate(self, *, timeout: float) -> bytes:
        """The hypervisor's certificate, DER; asked of the card once."""
        if self._certificate is None:
            async with self.lease(timeout=timeout) as card:
                self._certificate = await card.certificate()
        return self._certificate
