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
    """Work for one card. ``deadline`` is monotonic; a job that has begun is not interrupted by it."""

    work: Work[Card]
    deadline: float
    result: asyncio.Future[Any]
    queued_at: float

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

    Jobs whose deadline has passed are dropped when a worker meets them, or when room is needed.
    """

    name: str
    limit: int
    monotonic: Callable[[], float] = time.monotonic
    _jobs: deque[Job[Card]] = field(default_factory=deque)
    _idle: deque[asyncio.Future[None]] = field(default_factory=deque)
    _refusal: Callable[[], SlotError] | None = None
    # How long the last jobs took, smoothed: what a refused caller is told to wait.
    _seconds_per_job: float = 0.01

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, work: Work[Card], *, deadline: float) -> asyncio.Future[Any]:
        """Queues ``work``; the future yields what it returns, or SlotDeadlineError, CardUnavailableError, or what it raises.

        Raises SlotBusyError when the queue is full, CardUnavailableError when no card is in service. Cancelling the future of a job
        that has not begun takes it out.
        """
        if self._refusal is not None:
            raise self._refusal()
        if len(self._jobs) >= self.limit:
            self._drop_expired()
            if len(self._jobs) >= self.limit:
                raise SlotBusyError(self.name, len(self._jobs), self.expected_wait())
        now = self.monotonic()
        job: Job[Card] = Job(work, deadline, asyncio.get_running_loop().create_future(), now)
        self._jobs.append(job)
        self._wake()
        return job.result

    def give_back(self, job: Job[Card]) -> None:
        """A worker cannot do what it has taken, and has not begun: it is the next one's again."""
        self._jobs.appendleft(job)
        if self._refusal is not None:
            self.refuse(self._refusal)
        self._wake()

    def expected_wait(self) -> float:
        """Seconds until half of what waits now is done: a hint for callers that were refused."""
        return max(0.01, len(self._jobs) * self._seconds_per_job / 2)

    async def take(self, *, idle: float) -> Job[Card] | None:
        """The next job that is still wanted and in time; None after ``idle`` seconds without one."""
        loop = asyncio.get_running_loop()
        until = loop.time() + idle
        while True:
            while self._jobs:
                job = self._jobs.popleft()
                if not job.is_wanted:
                    continue
                if job.deadline <= self.monotonic():
                    job.fail(SlotDeadlineError(self.name))
                    continue
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

    def job_took(self, seconds: float) -> None:
        """Tells how long a job occupied its card."""
        self._seconds_per_job += (seconds - self._seconds_per_job) / 16

    def refuse(self, refusal: Callable[[], SlotError]) -> None:
        """No card is in service: every waiting job fails, and every new one, with what ``refusal`` makes."""
        self._refusal = refusal
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

    def _drop_expired(self) -> None:
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


def _wake_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


__all__ = ["CardUnavailableError", "Job", "JobQueue", "Work"]
