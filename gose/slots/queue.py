"""The queue before one card, or before several that can stand in for each other."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gose.slots.errors import CardUnavailableError, SlotBusyError, SlotClosedError, SlotDeadlineError, SlotError

Card = TypeVar("Card")
Work = Callable[[Card], Awaitable[Any]]


@dataclass(eq=False, slots=True)
class Job(Generic[Card]):
    """Work for one card: so many ``operations``. ``deadline`` is monotonic; a job that has begun is not interrupted by it."""

    work: Work[Card]
    deadline: float
    result: asyncio.Future[Any]
    queued_at: float
    operations: int = 1

    @property
    def is_wanted(self) -> bool:
        """False once nobody waits for it any more."""
        return not self.result.done()

    def fail(self, error: BaseException) -> None:
        """Ends the job with ``error``, unless it has ended."""
        if not self.result.done():
            self.result.set_exception(error)
            # Whoever asked may be gone: an error that nobody fetches is no news.
            self.result.exception()

    def succeed(self, value: Any) -> None:
        """Ends the job, unless it has ended."""
        if not self.result.done():
            self.result.set_result(value)


@dataclass(eq=False)
class JobQueue(Generic[Card]):
    """First in, first out; at most ``limit`` wait. Workers take from it; while none is in service, it refuses.

    A job that would still wait at its deadline, as far as one can tell from how long the last ones took, is refused when it comes: its
    caller can act upon that while there is time. Jobs whose deadline has passed are dropped when a worker meets them, or when room is
    needed. ``workers``: how many work it off now.
    """

    name: str
    limit: int
    monotonic: Callable[[], float] = time.monotonic
    workers: Callable[[], int] = lambda: 1
    refused: int = 0  # jobs, since it was made
    _jobs: deque[Job[Card]] = field(default_factory=deque)
    _idle: deque[asyncio.Future[None]] = field(default_factory=deque)
    _refusal: Callable[[], SlotError] | None = None
    # Operations of the jobs that wait, and of those that a worker has.
    _waiting: int = 0
    _in_work: int = 0
    _jobs_in_work: int = 0
    # How long the last ones took, smoothed; None: nothing is known yet.
    _seconds_per_operation: float | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, work: Work[Card], *, deadline: float, operations: int = 1) -> asyncio.Future[Any]:
        """Queues ``work``; the future yields what it returns, or SlotDeadlineError, CardUnavailableError, or what it raises.

        Raises SlotBusyError when the queue is full or the job's turn would come too late, CardUnavailableError when no card is in service.
        Cancelling the future of a job that has not begun takes it out.
        """
        if self._refusal is not None:
            raise self._refusal()
        now = self.monotonic()
        is_full = len(self._jobs) >= self.limit
        if self._jobs and (is_full or self._is_late(deadline - now)):
            self._drop_unwanted()
            is_full = len(self._jobs) >= self.limit
            if is_full or (self._jobs and self._is_late(deadline - now)):
                self.refused += 1
                wait = self.expected_wait()
                # When a full queue has halved, or when as much patience would do.
                missing = wait + (self._seconds_per_operation or 0.0) - (deadline - now)
                raise SlotBusyError(self.name, len(self._jobs), wait / 2 if is_full else missing)
        job: Job[Card] = Job(work, deadline, asyncio.get_running_loop().create_future(), now, operations)
        self._jobs.append(job)
        self._waiting += operations
        self._wake()
        return job.result

    def give_back(self, job: Job[Card]) -> None:
        """A worker cannot do what it has taken, and has not begun: it is the next one's again."""
        self._in_work -= job.operations
        self._jobs_in_work -= 1
        self._jobs.appendleft(job)
        self._waiting += job.operations
        if self._refusal is not None:
            self.refuse(self._refusal)
        self._wake()

    def expected_wait(self) -> float:
        """Seconds until a job that comes now has its turn. What a card works on counts half; what was sent to it ahead counts whole."""
        if self._seconds_per_operation is None:
            return 0.0
        workers = max(1, self.workers())
        left = 1 - min(self._jobs_in_work, workers) / (2 * max(1, self._jobs_in_work))
        return (self._waiting + self._in_work * left) * self._seconds_per_operation / workers

    def _is_late(self, patience: float) -> bool:
        """Whether not even one operation would be done by then."""
        return self.expected_wait() + (self._seconds_per_operation or 0.0) > patience

    def take_now(self) -> Job[Card] | None:
        """The next job that is still wanted and in time, if there is one."""
        while self._jobs:
            job = self._jobs.popleft()
            self._waiting -= job.operations
            if not job.is_wanted:
                continue
            if job.deadline <= self.monotonic():
                job.fail(SlotDeadlineError(self.name))
                continue
            self._in_work += job.operations
            self._jobs_in_work += 1
            return job
        return None

    async def take(self, *, idle: float) -> Job[Card] | None:
        """The next job that is still wanted and in time; None after ``idle`` seconds without one."""
        loop = asyncio.get_running_loop()
        until = loop.time() + idle
        while True:
            job = self.take_now()
            if job is not None:
                return job
            if loop.time() >= until:
                return None
            waiter = loop.create_future()
            self._idle.append(waiter)
            timer = loop.call_at(until, _wake_up, waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                # The wake-up that was meant for this worker belongs to the next one.
                if waiter.done() and not waiter.cancelled():
                    self._wake()
                raise
            finally:
                timer.cancel()
                if waiter in self._idle:
                    self._idle.remove(waiter)

    def job_ended(self, job: Job[Card], seconds: float | None) -> None:
        """A worker is done with what it took. ``seconds``: what an operation of it took; None: that says nothing about the next one."""
        self._in_work -= job.operations
        self._jobs_in_work -= 1
        if seconds is not None:
            before = self._seconds_per_operation
            self._seconds_per_operation = seconds if before is None else before + (seconds - before) / 16

    def refuse(self, refusal: Callable[[], SlotError]) -> None:
        """No card is in service: every waiting job fails, and every new one, with what ``refusal`` makes."""
        self._refusal = refusal
        self._waiting = 0
        while self._jobs:
            self._jobs.popleft().fail(refusal())

    def accept(self) -> None:
        """A card is in service again."""
        self._refusal = None

    def close(self) -> None:
        """For good: waiting and new jobs fail with SlotClosedError."""
        self.refuse(lambda: SlotClosedError(self.name))

    def _wake(self) -> None:
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _drop_unwanted(self) -> None:
        now = self.monotonic()
        kept: deque[Job[Card]] = deque()
        for job in self._jobs:
            if not job.is_wanted:
                continue
            if job.deadline <= now:
                job.fail(SlotDeadlineError(self.name))
            else:
                kept.append(job)
        self._jobs = kept
        self._waiting = sum(job.operations for job in kept)


def _wake_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


__all__ = ["CardUnavailableError", "Job", "JobQueue", "Work"]
