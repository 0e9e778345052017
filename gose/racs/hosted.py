"""One card of a node, and the session that has it (draft-urien-core-racs-15, 5.2): nobody else can reach it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from gose.racs.metrics import NodeMetrics
from secfunet.card.errors import CardBusyError, CardError
from secfunet.card.ports import CardPort
from secfunet.racs.commands import CommandError
from secfunet.racs.sen import name_in_atr
from secfunet.racs.status import Event
from secfunet.service.flood_log import FloodLog

log = logging.getLogger(__name__)
_flood = FloodLog(log)

CLOSE_TIMEOUT = 1.0  # seconds to power a card off


class HostedCard:
    """Locked by the session that powers it on, unlocked when that session gives it back or ends.

    Methods are the locking session's to call, one after another. They raise CommandError; after one of class hardware the card is off.
    """

    def __init__(
        self,
        seid: str,
        connect: Callable[[], Awaitable[CardPort]],
        metrics: NodeMetrics,
        *,
        apdu_timeout: float,
        sen: str | None = None,
    ) -> None:
        self.seid = seid
        self.aid: bytes | None = None
        self._connect = connect
        self._metrics = metrics
        self._timeout = apdu_timeout
        self._sen = sen
        self._sen_in_atr: str | None = None
        self._owner: object | None = None
        self._port: CardPort | None = None

    @property
    def sen(self) -> str | None:
        """The name for TLS clients: the one that was set, else what the card's answer to reset says; None if neither is known."""
        return self._sen or self._sen_in_atr

    def name(self, sen: str, aid: bytes | None) -> None:
        """Sets the name, until the node starts again."""
        self._sen, self.aid = sen, aid

    @property
    def is_in_use(self) -> bool:
        """Whether a session has it."""
        return self._owner is not None

    def is_owned_by(self, session: object) -> bool:
        """Whether that session has it."""
        return self._owner is session

    def lock(self, session: object) -> None:
        """Gives the card to the session. Raises CommandError (in use) if another one has it."""
        if self._owner is not None and self._owner is not session:
            raise CommandError(Event.IN_USE, f"{self.seid} is already in use")
        if self._owner is None:
            self._owner = session
            self._metrics.cards_in_use.inc()

    async def power_on(self) -> bool:
        """Connects the card; returns False if it was on already."""
        if self._port is not None:
            return False
        try:
            self._port = await self._connect()
            self._sen_in_atr = name_in_atr(await self._in_time(self._port.reset()))
        except CardBusyError as error:
            # Another program of this host has the card: it may be free soon.
            await self.unlock()
            _flood.warning(f"{self.seid} in use", "a card is in use", {"seid": self.seid, "cause": str(error)})
            raise CommandError(Event.IN_USE, f"{self.seid} is already in use") from None
        except (CardError, OSError) as error:
            raise await self._lost(error) from None
        except BaseException:
            await self.unlock()
            raise
        return True

    async def reset(self, *, warm: bool) -> None:
        """A warm reset of a card that is on; else the card is powered off and on."""
        if warm and self._port is not None:
            await self._hardware(self._port.reset())
            return
        await self._power_off()
        await self.power_on()

    async def transmit(self, apdu: bytes) -> bytes:
        """One command there, its response back. The card must be on."""
        if self._port is None:
            raise CommandError(Event.HARDWARE, f"{self.seid} is off")
        began = time.monotonic()
        response = await self._hardware(self._port.transmit(apdu))
        self._metrics.card_seconds.observe(time.monotonic() - began)
        return response

    async def unlock(self) -> None:
        """Powers the card off and gives it back."""
        try:
            await self._power_off()
        finally:
            if self._owner is not None:
                self._owner = None
                self._metrics.cards_in_use.dec()

    async def _hardware(self, exchange: Awaitable[bytes]) -> bytes:
        try:
            return await self._in_time(exchange)
        except (CardError, OSError) as error:
            raise await self._lost(error) from None

    async def _lost(self, error: Exception) -> CommandError:
        # The log has the cause; a user on another host need not know the paths of this one.
        log.warning("a card is lost", extra={"seid": self.seid, "cause": str(error)})
        await self.unlock()
        return CommandError(Event.HARDWARE, f"{self.seid} does not answer")

    async def _in_time(self, exchange: Awaitable[bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                return await exchange
        except TimeoutError:
            raise CardError(f"the card did not answer within {self._timeout:g} s") from None

    async def _power_off(self) -> None:
        port, self._port = self._port, None
        if port is not None:
            with contextlib.suppress(CardError, OSError):  # TimeoutError is an OSError
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await port.close()
