"""From its place to a card that is ready for work: applet selected, PIN verified, TLS-Id set."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from gose.cards import CardWays
from gose.settings import Limits, SecureElementSettings
from gose.slots.errors import SlotError
from gose.slots.figures import CardFigures
from gose.slots.port import GuardedPort
from secfunet.apdu import PinError, StatusError
from secfunet.card.binding import Binding
from secfunet.card.client import CardClient
from secfunet.card.instructions import Ins
from secfunet.card.parameters import Segmentation
from secfunet.card.ready import CardOpener, PinWithheldError


class PinRefusedError(SlotError):
    """The card refused the PIN, or it would be its last attempt; it is not tried again before there is another."""

    def __init__(self, seid: str, message: str) -> None:
        super().__init__(f"{seid}: {message}")
        self.seid = seid


class KeyMissingError(SlotError):
    """The card takes the PIN, and holds no key that could be used: it is blank, or was made anew."""


@dataclass(frozen=True)
class ReadyCard:
    """A card that is ready for work, and the port below its client. ``figures``: where work on it counts its operations; ``sent_last``: see
    ``sending_last``.
    """

    client: CardClient
    port: GuardedPort
    binding: Binding | None = None
    figures: CardFigures = field(default_factory=CardFigures)
    sent_last: Callable[[], None] = lambda: None

    def sending_last(self) -> None:
        """The job's last commands are about to be sent: those of the next job may follow while the card works on them.

        Only for work that nothing of the next one can disturb: each command is a whole APDU, and so is its answer.
        """
        if self.client.segmentation is Segmentation.EXTENDED:
            self.sent_last()


ConnectCard = Callable[[], Awaitable[ReadyCard]]


class CardConnector:
    """Makes ReadyCards of one secure element, as often as the slot needs a new one."""

    def __init__(self, element: SecureElementSettings, limits: Limits, ways: CardWays) -> None:
        self._element = element
        self._limits = limits
        self._ways = ways
        self._open = CardOpener(
            self._connect,
            element.read_pin,
            identity=element.label,
            segmentation=element.card_segmentation,
        )

    async def __call__(self) -> ReadyCard:
        """Raises CardGoneError, StatusError, PinRefusedError, KeyMissingError, TimeoutError, and what files of PIN and TLS raise (OSError,
        TlsFilesError, UnsafeFileError).
        """
        try:
            async with asyncio.timeout(self._limits.card_connect_timeout):
                client = await self._open()
                binding = await self._binding(client)
        except PinWithheldError as error:
            raise PinRefusedError(
                self._element.seid,
                f"{error}; attempts left: {error.attempts_remaining}; unblock the card, or correct its PIN",
            ) from None
        except PinError as error:
            raise PinRefusedError(
                self._element.seid,
                f"the card refuses the PIN {self._element.pin_source}; attempts left: {error.attempts_remaining}",
            ) from None
        except StatusError as error:
            if (error.sw, error.ins) != (0x6985, Ins.SET_IDENTITY):
                raise
            raise KeyMissingError(
                f"{self._element.seid}: the card holds no key with a certificate under the name '{self._element.label}'; enrol it again"
            ) from None
        if not isinstance(client.port, GuardedPort):
            raise AssertionError("a client keeps the port that it was made with")
        return ReadyCard(client, client.port, binding)

    async def _binding(self, client: CardClient) -> Binding | None:
        """To whom a VM's card is bound: read anew with each connection, for an administrator who changes it takes the card."""
        if self._element.role != "vm":
            return None
        try:
            return await client.binding()
        except BaseException:
            await client.close()
            raise

    async def _connect(self) -> GuardedPort:
        limits = self._limits
        port = await self._ways.connect(self._element, timeout=limits.card_connect_timeout)
        return GuardedPort(port, timeout=limits.operation_timeout)
