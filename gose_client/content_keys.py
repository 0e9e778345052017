"""Content keys of containers: unwrapped by the hypervisor's card once a key, not once a container, and remembered within a bound."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric import rsa

from gose_client.cards import CarefulCards
from gose_client.connectors import explain
from gose_client.errors import ContainerRefusedError, DeadlineError
from secfunet.apdu import StatusError
from secfunet.container import ContainerError, ContainerProfile, modulus_size, verify_container
from secfunet.errors import SecFuNetError
from secfunet.identity import load_certificate, rsa_key_of


class ContentKeys:
    """A cache by the SHA-256 of the header. A trailer is verified before its header ever reaches the card."""

    def __init__(self, cards: CarefulCards, profile: ContainerProfile, *, limit: int, card_timeout: float) -> None:
        self._cards = cards
        self._profile = profile
        self._limit = limit
        self._card_timeout = card_timeout
        self._keys: OrderedDict[bytes, bytes] = OrderedDict()
        self._unwrapping: dict[bytes, asyncio.Task[bytes]] = {}
        self.unwrapped = 0  # how often the card was asked

    def __repr__(self) -> str:
        return f"<ContentKeys {len(self._keys)} of {self._limit}>"

    async def key_of(self, untrusted: bytes, authorities: Iterable[rsa.RSAPublicKey], *, timeout: float) -> bytes:
        """The 32-byte key of a container that one of ``authorities`` signed.

        Raises ContainerRefusedError, DeadlineError, or what keeps the card from its service (GoseClientError).
        """
        header = self._verified_header(untrusted, await self._header_size(), authorities)
        name = hashlib.sha256(header).digest()
        known = self._keys.get(name)
        if known is not None:
            self._keys.move_to_end(name)
            return known
        task = self._unwrapping.get(name)
        if task is None:
            # A task of its own: a caller that gives up must not take the answer from the others, nor stop a card in mid-command.
            task = asyncio.get_running_loop().create_task(self._unwrap(name, header))
            self._unwrapping[name] = task
            task.add_done_callback(lambda done: self._settle(name, done))
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(task)
        except TimeoutError:
            raise DeadlineError from None

    def forget(self) -> None:
        """Drops every key."""
        self._keys.clear()

    async def close(self) -> None:
        """Waits for the card, then drops every key."""
        if self._unwrapping:
            await asyncio.wait(set(self._unwrapping.values()))
        self.forget()

    def _verified_header(self, untrusted: bytes, header_size: int, authorities: Iterable[rsa.RSAPublicKey]) -> bytes:
        for authority in authorities:
            try:
                return verify_container(untrusted, authority, header_size, self._profile).header
            except ContainerError:
                continue
        raise ContainerRefusedError

    async def _header_size(self) -> int:
        try:
            certificate = await self._cards.certificate(timeout=self._card_timeout)
            return modulus_size(rsa_key_of(load_certificate(certificate)))
        except SecFuNetError as error:
            raise explain(error, "the hypervisor's card") from error

    async def _unwrap(self, name: bytes, header: bytes) -> bytes:
        try:
            async with self._cards.lease(timeout=self._card_timeout) as card, asyncio.timeout(self._card_timeout):
                key = await card.unwrap_key(self._profile, header)
        except StatusError as error:
            raise ContainerRefusedError from error
        except (SecFuNetError, TimeoutError) as error:
            raise explain(error, "the hypervisor's card") from error
        self.unwrapped += 1
        self._keys[name] = key
        while len(self._keys) > self._limit:
            self._keys.popitem(last=False)
        return key

    def _settle(self, name: bytes, task: asyncio.Task[bytes]) -> None:
        self._unwrapping.pop(name, None)
        if not task.cancelled():
            task.exception()  # seen, even if every caller has given up
