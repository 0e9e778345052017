"""All the cards of a grid: a queue of its own before each VM's card, one queue before all the server cards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from gose.cards import CardWays
from gose.metrics import Metrics
from gose.settings import GoseSettings, SecureElementSettings
from gose.slots.bank import Bank
from gose.slots.connect import CardConnector
from gose.slots.export import CardCollector
from gose.slots.shares import Part, share
from gose.slots.slot import Admit, Slot, admit_any
from secfunet.card.pool import CardPool
from secfunet.service.reload import alike

SERVER_CARDS = "server cards"


class Rack:
    """Fairness is by card: no VM's operations wait behind another VM's. ``servers``: all server cards; ``logins`` and ``radius``: the parts
    of them for hypervisors' logins and for peers by RADIUS; ``radius`` is there only in a grid that is a RADIUS server.
    """

    radius: Part

    def __init__(self, settings: GoseSettings, metrics: Metrics, *, admit: Admit = admit_any) -> None:
        self._limits = settings.limits
        self._metrics = metrics
        self._admit = admit
        self._racs = settings.racs
        self._ways = CardWays.of(settings)
        self.elements = {element.seid: element for element in settings.secure_elements}
        of_servers = [element for element in settings.secure_elements if element.role == "server"]
        self.servers = self._bank(SERVER_CARDS, *of_servers)
        self._vms: dict[str, Bank] = {}
        for element in settings.secure_elements:
            if element.role == "vm":
                self._vms[element.seid] = self._bank(element.seid, element)
        self.logins: CardPool = self.servers
        if settings.radius is not None:
            in_service = self.servers.queue.workers
            self.logins, self.radius = share(self.servers, in_service, "logins", "RADIUS")
        metrics.registry.register(CardCollector(self.slots, lambda: (one.queue for one in self.banks())))

    def vm(self, seid: str) -> Bank | None:
        """The queue of a VM's card, or None if the grid has no such card."""
        return self._vms.get(seid)

    def banks(self) -> tuple[Bank, ...]:
        """Every queue with its slots; a VM's card's has the card's SEID as its name, the server cards' SERVER_CARDS."""
        return (*self._vms.values(), self.servers)

    def slots(self) -> Iterator[Slot]:
        """Every slot."""
        for bank in self.banks():
            yield from tuple(bank.slots)

    async def start(self) -> None:
        """Starts every slot; returns when each is in service or has failed once."""
        await asyncio.gather(self.servers.start(), *(bank.start() for bank in self._vms.values()))

    async def change(self, settings: GoseSettings) -> list[str]:
        """Has the cards of these settings, and no others; what is said of it. A card whose table is as it was is not touched.

        One that goes ends what it works on. One that comes is in service, or has failed once, when this returns.
        """
        ways_differ = not alike(self._racs, settings.racs)
        self._racs, self._ways = settings.racs, CardWays.of(settings)
        before, after = self.elements, {element.seid: element for element in settings.secure_elements}

        def stays(seid: str) -> bool:
            old, new = before.get(seid), after.get(seid)
            return old is not None and alike(old, new) and not (ways_differ and old.racs is not None)

        gone = [old for seid, old in before.items() if not stays(seid)]
        come = [new for seid, new in after.items() if not stays(seid)]
        # A typed PIN is in the table that was there when it was typed.
        self.elements = {seid: before[seid] if stays(seid) else new for seid, new in after.items()}
        # All that go first: one that comes may be the same card at another place.
        await asyncio.gather(*(self._remove(old, after.get(old.seid)) for old in gone))
        await asyncio.gather(*map(self._add, come))
        changed = {one.seid for one in gone} & {one.seid for one in come}
        return [
            *(f"card {one.seid} changed" for one in come if one.seid in changed),
            *(f"card {one.seid} added" for one in come if one.seid not in changed),
            *(f"card {one.seid} removed" for one in gone if one.seid not in changed),
        ]

    async def close(self) -> None:
        """Stops every slot; what waits fails."""
        await asyncio.gather(self.servers.close(), *(bank.close() for bank in self._vms.values()))

    def _bank(self, name: str, *elements: SecureElementSettings) -> Bank:
        cards = [(element.seid, self._connector(element)) for element in elements]
        bank = Bank(name, cards, self._limits, self._metrics, admit=self._admit)
        self._metrics.queue_length.labels(name).set_function(bank.queue.__len__)
        return bank

    def _connector(self, element: SecureElementSettings) -> CardConnector:
        return CardConnector(element, self._limits, self._ways)

    async def _add(self, element: SecureElementSettings) -> None:
        if element.role == "server":
            await self.servers.add(element.seid, self._connector(element))
        else:
            bank = self._vms[element.seid] = self._bank(element.seid, element)
            await bank.start()

    async def _remove(self, element: SecureElementSettings, after: SecureElementSettings | None) -> None:
        """``after``: what comes in its place, if anything does. A VM's queue stays until then: it says that waiting heals it."""
        if element.role == "server":
            await self.servers.remove(element.seid)
        elif after is not None and after.role == "vm":
            await self._vms[element.seid].retire()
        else:
            await self._vms.pop(element.seid).retire()
            self._metrics.queue_length.remove(element.seid)
        with contextlib.suppress(KeyError):
            self._metrics.card_in_service.remove(element.seid)
