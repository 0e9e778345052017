"""The hypervisor's card as this client uses it: leased for moments, and left alone once it has refused a PIN."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from gose_client.errors import HypervisorCardError
from secfunet.apdu import PinError
from secfunet.card.client import CardClient
from secfunet.card.pool import CardPool


class CarefulCards:
    """A CardPool that stops for good at the first wrong PIN: an attempt that is repeated by itself would block the card."""

    def __init__(self, pool: CardPool) -> None:
        self._pool = pool
        self._refusal: str | None = None
        self._certificate: bytes | None = None

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
        """See CardPool.lease. Raises HypervisorCardError after a PIN was refused once."""
        if self._refusal is not None:
            raise HypervisorCardError(self._refusal)
        try:
            async with self._pool.lease(timeout=timeout) as card:
                yield card
        except PinError as error:
            self._refusal = f"the hypervisor's card refused the PIN and is not asked again: {error}"
            raise HypervisorCardError(self._refusal) from error

    async def certificate(self, *, timeout: float) -> bytes:
        """The hypervisor's certificate, DER; asked of the card once."""
        if self._certificate is None:
            async with self.lease(timeout=timeout) as card:
                self._certificate = await card.certificate()
        return self._certificate
