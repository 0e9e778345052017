"""One card's exclusive worker: it connects, serves, watches, and brings a dead card back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from enum import Enum
from functools import partial

from gose.metrics import Metrics
from gose.settings import Limits
from gose.slots.connect import ConnectCard, PinRefusedError, ReadyCard
from gose.slots.errors import CardNotAdmittedError, CardUnavailableError
from gose.slots.figures import CardFigures
from gose.slots.queue import Job, JobQueue
from secfunet.card.errors import CardBusyError, CardGoneError
from secfunet.errors import SecFuNetError

log = logging.getLogger(__name__)

# A card may not have noticed yet that its last user is gone, such as a grid that was killed and is started again.
BUSY_PATIENCE = 1.0  # seconds
BUSY_PAUSE = 0.02
LOST = "CARD_LOST"  # among a card's errors: operations that it died with

Admit = Callable[[str, bytes], None]
"""Asked whether the card of this SEID may be used with this certificate (DER); raises CardNotAdmittedError."""


def admit_any(seid: str, certificate: bytes) -> None:
    """For a slot without a registry."""


class SlotState(Enum):
    """Where a card stands. Jobs wait while it is CONNECTING; OUT_OF_SERVICE means that an attempt to reach it has failed."""

    CONNECTING = "connecting"
    IN_SERVICE = "in_service"
    OUT_OF_SERVICE = "out_of_service"
    CLOSED = "closed"


class Slot:
    """The worker of one card. Several may share a queue (cards that can stand in for each other).

    A job is run to its end once it has begun: cancelling or a deadline does not stop a card in the middle of an APDU. When its last
    commands are out, and it says so, the next job's are sent after them: a card that is busy does not wait for us in between. A job whose
    card dies fails with CardUnavailableError at once, and so does one that was sent ahead; the others of the queue wait for the first
    attempt to reconnect, and fail if that fails.
    ``admit`` is asked when the card was connected and before every job, so it must be quick.
    """

    def __init__(
        self,
        seid: str,
        queue: JobQueue[ReadyCard],
        connect: ConnectCard,
        limits: Limits,
        metrics: Metrics,
        *,
        on_state: Callable[[Slot], None],
        admit: Admit = admit_any,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seid = seid
        self.state = SlotState.CONNECTING
        self.cause = ""
        self.jobs_done = 0
        self.figures = CardFigures()
        self.next_attempt = 0.0
        self._queue = queue
        self._connect = connect
        self._limits = limits
        self._metrics = metrics
        self._on_state = on_state
        self._admit = admit
        self._certificate = b""
        self._monotonic = monotonic
        self._last_end = 0.0  # when the card was done with its last job
        self._first_attempt = asyncio.Event()
        self._leaves = False
        self._in_work = 0
        self._at_rest = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.create_task(self._run(), name=f"slot {self.seid}")

    async def first_attempt(self) -> None:
        """Returns when the card is in service or the first attempt has failed."""
        await self._first_attempt.wait()

    async def retire(self, patience: float) -> None:
        """Takes no job any more; the one in work has ``patience`` seconds to end. Then as ``close``."""
        self._leaves = True
        if self._in_work:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._at_rest.wait()
        await self.close()

    async def close(self) -> None:
        """Stops the worker. The job in work fails; its APDU is not awaited."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._set_state(SlotState.CLOSED)

    @property
    def queue_name(self) -> str:
        """Of the queue that it works off."""
        return self._queue.name

    @property
    def retry_after(self) -> float:
        """Seconds until the card is tried again, if it is out of service."""
        return max(0.01, self.next_attempt - self._monotonic())

    async def _run(self) -> None:
        backoff = self._limits.card_backoff
        while not self._leaves:
            try:
                card = await self._connect_admitted()
            except (SecFuNetError, OSError) as error:  # TimeoutError is an OSError
                self.next_attempt = self._monotonic() + backoff
                self._out_of_service(
                    str(error) or "it did not answer in time", locked=isinstance(error, PinRefusedError)
                )
                self._first_attempt.set()
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, self._limits.card_backoff_max)
                continue
            backoff = self._limits.card_backoff
            self._set_state(SlotState.IN_SERVICE)
            self._first_attempt.set()
            try:
                await self._serve(card)
            except CardGoneError as error:
                log.warning("the card is gone; connecting again", extra={"seid": self.seid, "cause": str(error)})
                self.cause = str(error)
                self._set_state(SlotState.CONNECTING)
            except CardNotAdmittedError as error:
                self._out_of_service(error.cause, locked=True)
            finally:
                card.port.abandon()
                with contextlib.suppress(SecFuNetError, OSError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        await card.port.close()

    async def _connect_admitted(self) -> ReadyCard:
        card = dataclasses.replace(await self._connect_patiently(), figures=self.figures)
        try:
            self._certificate = await card.client.certificate()
            self._admit(self.seid, self._certificate)
        except BaseException:
            await card.port.close()
            raise
        return card

    async def _connect_patiently(self) -> ReadyCard:
        until = self._monotonic() + BUSY_PATIENCE
        while True:
            try:
                return await self._connect()
            except CardBusyError:
                if self._monotonic() >= until:
                    raise
            await asyncio.sleep(BUSY_PAUSE)

    async def _serve(self, card: ReadyCard) -> None:
        """Until the card is gone, or not admitted any more (it has ended what it worked on then)."""
        in_card: asyncio.Task[None] | None = None  # the job that it works on, while another may follow
        following: asyncio.Task[None] | None = None
        try:
            while True:
                job = await self._next_job(card, in_card)
                try:
                    if in_card is not None and in_card.done():
                        in_card.result()
                        self._check(card)
                        in_card = None
                    self._admit(self.seid, self._certificate)
                    if self._leaves:
                        raise CardNotAdmittedError(self.seid, "it leaves the grid")
                except (CardGoneError, CardNotAdmittedError):
                    if job is not None:
                        self._queue.give_back(job)
                    if in_card is not None:
                        await in_card
                    raise
                if job is None:
                    await self._ask_for_life(card)
                    continue
                sent_last: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                told = partial(_settle, sent_last)
                self._in_work += 1
                self._at_rest.clear()
                following = asyncio.create_task(self._do(job, dataclasses.replace(card, sent_last=told)))
                following.add_done_callback(self._job_done)
                await asyncio.wait((following, sent_last), return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
                if in_card is not None:
                    await in_card
                self._check(card)
                in_card, following = following, None
        except CardGoneError:
            # What was sent ahead is lost with it.
            card.port.abandon()
            await asyncio.gather(*filter(None, (in_card, following)), return_exceptions=True)
            raise
        finally:
            for task in filter(None, (in_card, following)):
                task.cancel()
            await asyncio.gather(*filter(None, (in_card, following)), return_exceptions=True)

    async def _next_job(self, card: ReadyCard, in_card: asyncio.Task[None] | None) -> Job[ReadyCard] | None:
        """None: there was none for a while, and the card is idle. Raises CardGoneError."""
        if in_card is not None and not in_card.done():
            if (job := self._queue.take_now()) is not None:
                return job
            taking = asyncio.ensure_future(self._queue.take(idle=self._limits.watchdog_interval))
            try:
                await asyncio.wait((taking, in_card), return_when=asyncio.FIRST_COMPLETED)
                if in_card.done():
                    in_card.result()
                    self._check(card)
                if (job := await taking) is not None or in_card.done():
                    return job
                await in_card
            except BaseException:
                taking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    if (job := await taking) is not None:
                        self._queue.give_back(job)
                raise
        if in_card is not None:
            in_card.result()
            self._check(card)
        return await self._queue.take(idle=self._limits.watchdog_interval)

    @staticmethod
    def _check(card: ReadyCard) -> None:
        if card.port.is_lost:
            raise CardGoneError("the connection to the card was lost")

    async def _ask_for_life(self, card: ReadyCard) -> None:
        try:
            async with asyncio.timeout(self._limits.watchdog_timeout):
                await card.client.state()
        except TimeoutError:
            raise CardGoneError("an idle card gave no sign of life") from None

    async def _do(self, job: Job[ReadyCard], card: ReadyCard) -> None:
        began, before = self._monotonic(), self.figures.operations
        is_whole = False
        try:
            value = await job.work(card)
            is_whole = not card.port.is_lost
        except (CardGoneError, OSError) as error:
            self.figures.failed(LOST, job.operations)
            job.fail(CardUnavailableError(self.seid, str(error), self._limits.card_backoff))
            raise CardGoneError(str(error)) from error
        except asyncio.CancelledError:
            job.fail(CardUnavailableError(self.seid, "the grid shuts down", 1.0))
            raise
        except Exception as error:  # noqa: BLE001 - the job's own fault: whoever asked gets it, the worker goes on
            job.fail(error)
        else:
            job.succeed(value)
        finally:
            now = self._monotonic()
            began, self._last_end = max(began, self._last_end), now
            took = now - began
            operations = self.figures.operations - before or job.operations
            # A card that died has not shown how long its work takes.
            self._queue.job_ended(job, took / operations if is_whole else None)
            self.figures.job_ended(waited=began - job.queued_at, worked=took, operations=operations)
            self._metrics.slot_waited.observe(began - job.queued_at)
            self._metrics.slot_worked.observe(took)
            self.jobs_done += 1

    def _job_done(self, _: asyncio.Task[None]) -> None:
        self._in_work -= 1
        if not self._in_work:
            self._at_rest.set()

    def _out_of_service(self, cause: str, *, locked: bool) -> None:
        if self.state is not SlotState.OUT_OF_SERVICE or cause != self.cause:
            level = logging.ERROR if locked else logging.WARNING
            log.log(level, "the card is out of service", extra={"seid": self.seid, "cause": cause})
        self.cause = cause
        self._set_state(SlotState.OUT_OF_SERVICE)

    def _set_state(self, state: SlotState) -> None:
        if state is SlotState.IN_SERVICE:
            log.info("the card is in service", extra={"seid": self.seid})
        self.state = state
        self._metrics.card_in_service.labels(self.seid).set(state is SlotState.IN_SERVICE)
        self._on_state(self)


def _settle(happened: asyncio.Future[None]) -> None:
    if not happened.done():
        happened.set_result(None)
