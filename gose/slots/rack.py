"""All the cards of a grid: a queue of its own before each VM's card, one queue before all the server cards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from gose.cards import CardWays
from gose.metrics import Metrics
from gose.settings import GoseSettings
from gose.slots.bank import Bank
from gose.slots.connect import CardConnector
from gose.slots.export import CardCollector
from gose.slots.shares import Part, share
from gose.slots.slot import Admit, Slot, admit_any
from secfunet.card.pool import CardPool

SERVER_CARDS = "server cards"


class Rack:
    """Fairness is by card: no VM's operations wait behind another VM's. ``servers``: all server cards; ``logins`` and ``radius``: the parts
    of them for hypervisors' logins and for peers by RADIUS; ``radius`` is there only in a grid that is a RADIUS server.
    """

    radius: Part

    def __init__(self, settings: GoseSettings, metrics: Metrics, *, admit: Admit = admit_any) -> None:
        limits = settings.limits
        ways = CardWays.of(settings)

        def bank(name: str, *seids: str) -> Bank:
            elements = [element for element in settings.secure_elements if element.seid in seids]
            return Bank(
                name,
                [(element.seid, CardConnector(element, limits, ways)) for element in elements],
                limits,
                metrics,
                admit=admit,
            )

        self._vms = {
            element.seid: bank(element.seid, element.seid)
            for element in settings.secure_elements
            if element.role == "vm"
        }
        self.servers = bank(
            SERVER_CARDS, *(element.seid for element in settings.secure_elements if element.role == "server")
        )
        self.logins: CardPool = self.servers
        if settings.radius is not None:
            in_service = self.servers.queue.workers
            self.logins, self.radius = share(self.servers, in_service, "logins", "RADIUS")
        for name, vm_bank in [*self._vms.items(), (SERVER_CARDS, self.servers)]:
            metrics.queue_length.labels(name).set_function(vm_bank.queue.__len__)
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
            yield from bank.slots

    async def start(self) -> None:
        """Starts every slot; returns when each is in service or has failed once."""
        await asyncio.gather(self.servers.start(), *(bank.start() for bank in self._vms.values()))

    async def close(self) -> None:
        """Stops every slot; what waits fails."""
        await asyncio.gather(self.servers.close(), *(bank.close() for bank in self._vms.values()))
