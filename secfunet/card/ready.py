"""From a port to a card that is ready for work, and the one rule for PINs that a program enters.

The rule: a program never spends the last attempt, and never tries a PIN twice that the card has refused; what is left belongs to a
person. So a wrong PIN in a file costs one attempt, however often the program connects.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Final

from secfunet.apdu import PinError
from secfunet.card.client import CardClient
from secfunet.card.instructions import Ins
from secfunet.card.parameters import Segmentation
from secfunet.card.ports import CardPort

MIN_PIN_ATTEMPTS: Final = 2
"""Attempts that must be left before a program enters a PIN."""


class PinWithheldError(PinError):
    """The PIN was not tried, and no attempt was spent: it was refused before, or only the last attempt is left (or none)."""

    def __init__(self, reason: str, attempts_remaining: int) -> None:
        super().__init__(0x6300 | attempts_remaining, Ins.VERIFY_PIN, attempts_remaining)
        self.args = (reason,)


async def verify_carefully(card: CardClient, pin: bytes) -> None:
    """Verify-PIN, unless that could block the card. Raises PinWithheldError, PinError."""
    attempts = await card.pin_attempts()
    if attempts < MIN_PIN_ATTEMPTS:
        left = "only the last attempt at it is left" if attempts else "it is blocked"
        raise PinWithheldError(f"the user's PIN was not tried: {left}", attempts)
    await card.verify_pin(pin)


async def ready_card(
    port: CardPort,
    *,
    pin: bytes,
    identity: str | None = None,
    segmentation: Segmentation = Segmentation.EXTENDED,
) -> CardClient:
    """Selects the applet, verifies the PIN and (if one is named) sets the TLS-Id. Closes ``port`` when that fails.

    Raises PinWithheldError, PinError, StatusError (6985: no such identity), CardError, ApduError.
    """
    card = CardClient(port, segmentation=segmentation)
    try:
        await card.select()
        await verify_carefully(card, pin)
        if identity is not None:
            await card.set_identity(identity)
    except BaseException:
        await card.close()
        raise
    return card


class CardOpener:
    """Makes one card ready, as often as its user needs a new connection.

    ``read_pin`` is asked every time, so that a PIN that somebody corrects heals the card; of a refused one a salted hash is kept.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[CardPort]],
        read_pin: Callable[[], bytes],
        *,
        identity: str | None = None,
        segmentation: Segmentation = Segmentation.EXTENDED,
    ) -> None:
        self._connect = connect
        self._read_pin = read_pin
        self._identity = identity
        self._segmentation = segmentation
        self._salt = os.urandom(16)
        self._refused: tuple[bytes, int] | None = None

    async def __call__(self) -> CardClient:
        """Raises what ``connect``, ``read_pin`` and ready_card raise; PinWithheldError for a PIN that was refused before."""
        pin = self._read_pin()
        digest = hashlib.sha256(self._salt + pin).digest()
        if self._refused is not None and hmac.compare_digest(self._refused[0], digest):
            raise PinWithheldError("the card has refused this PIN before; it is not tried again", self._refused[1])
        port = await self._connect()
        try:
            return await ready_card(port, pin=pin, identity=self._identity, segmentation=self._segmentation)
        except PinWithheldError:
            raise
        except PinError as error:
            self._refused = digest, error.attempts_remaining
            raise
