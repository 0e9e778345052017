"""One queue and the slots behind it: a single card (a VM's) or several that can stand in for each other (server cards)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from gose.metrics import Metrics
from gose.settings import Limits
from gose.slots.connect import ConnectCard, ReadyCard
from gose.slots.errors import CardUnavailableError, SlotDeadlineError, SlotError
from gose.slots.queue import JobQueue
from gose.slots.slot import Admit, Slot, SlotState, admit_any
from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError, CardGoneError
from secfunet.card.lease import Lease

Result = TypeVar("Result")

FORGOTTEN = "LEASE_FORGOTTEN"  # among a server card's errors: it was taken away from its borrower


class Bank:
    """Jobs for one queue of cards. It refuses while every card of it is out of service."""

    def __init__(
        self,
        name: str,
        cards: Sequence[tuple[str, ConnectCard]],
        limits: Limits,
        metrics: Metrics,
        *,
        admit: Admit = admit_any,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._limits = limits
        self._metrics = metrics
        self._admit = admit
        self._monotonic = monotonic
        self.queue: JobQueue[ReadyCard] = JobQueue(name, limits.slot_queue, monotonic, workers=self._in_service)
        self.slots = [self._new_slot(seid, connect) for seid, connect in cards]
        if not self.slots:
            self.queue.refuse(self._no_card)

    async def start(self) -> None:
        """Starts the workers and waits until each is in service or has failed once."""
        for slot in self.slots:
            slot.start()
        await asyncio.gather(*(slot.first_attempt() for slot in self.slots))

    async def add(self, seid: str, connect: ConnectCard) -> None:
        """One card more; returns when it is in service or has failed once."""
        slot = self._new_slot(seid, connect)
        self.slots.append(slot)
        slot.start()
        await slot.first_attempt()

    async def remove(self, seid: str) -> None:
        """The card takes no job any more, and goes when it has done what it works on (``operation_timeout``, at most)."""
        (slot,) = [slot for slot in self.slots if slot.seid == seid]
        await slot.retire(self._limits.operation_timeout)
        self.slots.remove(slot)
        if not self.slots:
            self.queue.refuse(self._no_card)
        elif all(other.state is SlotState.OUT_OF_SERVICE for other in self.slots):
            self.queue.refuse(self._unavailable)

    async def retire(self) -> None:
        """All its cards go, as in ``remove``; waiting and new jobs fail: whoever asks again is told how things are then."""
        self.queue.refuse(
            lambda: CardUnavailableError(self.name, "its settings have changed", self._limits.card_backoff)
        )
        await asyncio.gather(*(slot.retire(self._limits.operation_timeout) for slot in self.slots))

    async def close(self) -> None:
        """Waiting jobs fail, and the workers stop."""
        self.queue.close()
        await asyncio.gather(*(slot.close() for slot in self.slots))

    def submit(
        self, work: Callable[[ReadyCard], Awaitable[Result]], *, deadline: float, operations: int = 1
    ) -> asyncio.Future[Result]:
        """Queues ``work``; see JobQueue.put. ``deadline`` (monotonic) is for the waiting: work that has begun ends by itself."""
        return self.queue.put(work, deadline=deadline, operations=operations)

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
        """A card for the time of the context (secfunet.card.pool.CardPool).

        Entering raises CardBusyError when none becomes free within ``timeout`` seconds (limits.server_card_timeout at most) or too many
        wait already, CardGoneError when none is in service.
        """
        timeout = min(timeout, self._limits.server_card_timeout)
        loop = asyncio.get_running_loop()
        lent: asyncio.Future[CardClient] = loop.create_future()
        given_back: asyncio.Future[None] = loop.create_future()

        async def lend(card: ReadyCard) -> None:
            if lent.done():
                return
            lease = Lease(card.client)
            lent.set_result(lease.client)
            is_returned = False
            try:
                async with asyncio.timeout(self._limits.longest_lease):
                    await given_back
                is_returned = True
            except TimeoutError:
                pass  # whoever holds a card this long has forgotten it
            finally:
                # What a borrower kept or left half done ends with its connection; the next lease starts from a fresh one.
                card.port.is_lost |= not is_returned
                card.port.is_lost |= not await lease.end()
                if is_returned:
                    card.figures.did()
                else:
                    card.figures.failed(FORGOTTEN)

        try:
            job = self.queue.put(lend, deadline=self._monotonic() + timeout)
        except SlotError as error:
            raise _as_card_error(error) from error

        def job_ended(ended: asyncio.Future[Any]) -> None:
            if not lent.done() and not ended.cancelled():
                error = ended.exception()
                lent.set_exception(_as_card_error(error) if isinstance(error, SlotError) else CardBusyError(self.name))
                lent.exception()

        job.add_done_callback(job_ended)
        try:
            try:
                async with asyncio.timeout(timeout):
                    client = await lent
            except TimeoutError:
                raise CardBusyError(f"no card of {self.name} became free within {timeout:g} s") from None
            yield client
        finally:
            if not lent.done() or lent.cancelled():
                job.cancel()
            lent.cancel()
            if not given_back.done():
                given_back.set_result(None)

    def _new_slot(self, seid: str, connect: ConnectCard) -> Slot:
        return Slot(
            seid,
            self.queue,
            connect,
            self._limits,
            self._metrics,
            on_state=self._slot_changed,
            admit=self._admit,
            monotonic=self._monotonic,
        )

    def _no_card(self) -> CardUnavailableError:
        return CardUnavailableError(self.name, "no card is configured", self._limits.card_backoff_max)

    def _in_service(self) -> int:
        return sum(slot.state is SlotState.IN_SERVICE for slot in self.slots)

    def _slot_changed(self, slot: Slot) -> None:
        if slot.state is SlotState.IN_SERVICE:
            self.queue.accept()
        elif slot.state is SlotState.OUT_OF_SERVICE and all(
            other.state in (SlotState.OUT_OF_SERVICE, SlotState.CLOSED) for other in self.slots
        ):
            self.queue.refuse(self._unavailable)

    def _unavailable(self) -> CardUnavailableError:
        soonest = min(self.slots, key=lambda slot: slot.next_attempt)
        return CardUnavailableError(self.name, soonest.cause, soonest.retry_after)


def _as_card_error(error: SlotError) -> CardBusyError | CardGoneError:
    if isinstance(error, CardUnavailableError):
        return CardGoneError(str(error))
    if isinstance(error, SlotDeadlineError):
        return CardBusyError(str(error))
    return CardBusyError(str(error))
