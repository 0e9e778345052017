"""From a socket to a card that is ready for work: applet selected, PIN verified, TLS-Id set."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gose.settings import Limits, SecureElementSettings
from gose.slots.errors import SlotError
from gose.slots.port import GuardedPort
from secfunet.apdu import PinError
from secfunet.card.client import CardClient
from secfunet.card.parameters import PinRole
from secfunet.card.unix import connect_unix
from secfunet.service.files import read_secret

MIN_PIN_ATTEMPTS = 2  # the last attempt is never spent by a machine


class PinRefusedError(SlotError):
    """The card refused the PIN in the file, or it would be its last attempt; it is not tried again before the file changes."""

    def __init__(self, seid: str, message: str) -> None:
        super().__init__(f"{seid}: {message}")
        self.seid = seid


@dataclass(frozen=True)
class ReadyCard:
    """A card that is ready for work, and the port below its client."""

    client: CardClient
    port: GuardedPort


ConnectCard = Callable[[], Awaitable[ReadyCard]]


class CardConnector:
    """Makes ReadyCards of one secure element, as often as the slot needs a new one."""

    def __init__(self, element: SecureElementSettings, limits: Limits) -> None:
        self._element = element
        self._limits = limits
        # Salted hash of a PIN that the card has refused: trying it again would only block the card.
        self._salt = os.urandom(16)
        self._refused_pin: bytes | None = None

    async def __call__(self) -> ReadyCard:
        """Raises CardGoneError, StatusError, PinRefusedError, TimeoutError, or OSError of the PIN file."""
        element, limits = self._element, self._limits
        pin = read_secret(element.user_pin_file).strip()
        digest = hashlib.sha256(self._salt + pin).digest()
        if self._refused_pin is not None and hmac.compare_digest(self._refused_pin, digest):
            raise PinRefusedError(element.seid, f"the PIN in {element.user_pin_file} was refused before")
        async with asyncio.timeout(limits.card_connect_timeout):
            port = GuardedPort(
                await connect_unix(element.socket, timeout=limits.card_connect_timeout),
                timeout=limits.operation_timeout,
            )
            try:
                client = CardClient(port)
                await client.select()
                if await client.pin_attempts(PinRole.USER) < MIN_PIN_ATTEMPTS:
                    raise PinRefusedError(
                        element.seid, "only the last attempt at the PIN is left: unblock the card first"
                    )
                try:
                    await client.verify_pin(pin)
                except PinError:
                    self._refused_pin = digest
                    raise PinRefusedError(
                        element.seid, f"the card refuses the PIN in {element.user_pin_file}"
                    ) from None
                await client.set_identity(element.label)
            except BaseException:
                await port.close()
                raise
        return ReadyCard(client, port)
