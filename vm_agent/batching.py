"""Batching: many callers, each with one operation and a deadline of its own, share one stream of batches.

Rules, in the order of the code:

1. A caller that comes alone has its operation sent at once, and callers of the same turn of the event loop go together. While others are
   under way, or have just been answered and are about to come again, a batch that is smaller than an even share (callers / max_in_flight)
   waits a moment for them: without that, callers whose answers come one by one would fall apart into small batches, and a batch costs
   much more than an operation.
2. While ``max_in_flight`` batches are under way, operations gather, and leave together, at most ``max_batch`` in one batch, when an answer
   comes.
3. A caller that is cancelled or runs out of time is forgotten: not sent if it was not, its answer dropped if it was.
4. When a stream is lost, what had no answer goes back to the front of the queue and is sent again, with the same request ids, over the
   next stream, as long as its caller waits. Streams are opened again at growing intervals.
5. A batch whose callers all ran out of time gives its place back; if the stream said nothing at all meanwhile, it counts as lost.
6. ``renew`` opens a new stream for what comes next; the old one is left to answer what it was asked, then closed.
7. ``hand_over`` ends all streams: what has no answer is sent again at once, to whom the next stream leads. The queue belongs to the
   callers, not to a connection or a certificate.
8. An operation that is answered with UnavailableError was not executed: it waits on, and the stream counts as lost.

No gRPC here: a stream is a ``BatchStream``, an answer is whatever ``receive`` makes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import random
from typing import Generic, Protocol, TypeVar

from vm_agent.errors import AgentError, DeadlineError, OverloadedError, UnavailableError

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.05  # seconds before the second attempt to open a stream
LONGEST_PAUSE = 2.0
GATHER_TIME = 0.003  # seconds that a batch waits for its even share, and that callers who were answered count as about to come again
EXPIRY_GRACE = 0.5  # seconds that a batch may be late before its place is given back
MAX_DRAINING = 4  # streams that are left to answer what they were asked

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Request_contra = TypeVar("Request_contra", contravariant=True)
Answer_co = TypeVar("Answer_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Request]):
    """One request on its way: ``request_id`` names it for as long as its caller waits."""

    request_id: bytes
    request: Request


class BatchStream(Protocol[Request_contra, Answer_co]):
    """One open stream. Any of its methods may raise UnavailableError (lost: the same may be sent again) or another AgentError (refused)."""

    async def send(self, batch_id: int, requests: Sequence[Request_contra], timeout: float) -> None:
        """Sends one batch; ``timeout`` in seconds is the longest that one of its callers waits."""

    async def receive(self) -> tuple[int, Answer_co]:
        """The next answer, with the id of its batch."""

    async def finish(self) -> None:
        """Nothing more will be sent; answers may still come."""

    def abort(self) -> None:
        """Ends the stream at once."""


@dataclass(eq=False, slots=True)
class _Waiting(Generic[Request]):
    ticket: Ticket[Request]
    deadline: float
    outcome: asyncio.Future[object]


@dataclass(eq=False, slots=True)
class _Batch(Generic[Request]):
    waiting: list[_Waiting[Request]]
    sent_at: float
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False, slots=True)
class _Lane(Generic[Request, Answer]):
    """A stream and the batches that it has not answered."""

    stream: BatchStream[Request, Answer]
    batches: dict[int, _Batch[Request]] = field(default_factory=dict)
    heard_at: float = 0.0  # when the last answer came
    draining: bool = False
    reader: asyncio.Task[None] | None = None


@dataclass(slots=True)
class BatcherCounters:
    """For metrics."""

    operations: int = 0
    batches: int = 0
    resent: int = 0
    streams: int = 0
    unexpected_answers: int = 0


class Batcher(Generic[Request, Answer]):
    """See the module. ``open_stream`` gives a new stream; ``settle`` turns a batch's answer into each request's output or error."""

    def __init__(
        self,
        open_stream: Callable[[], Awaitable[BatchStream[Request, Answer]]],
        settle: Callable[[Sequence[Ticket[Request]], Answer], Mapping[bytes, object | AgentError]],
        *,
        max_batch: int = 64,
        max_in_flight: int = 2,
        max_waiting: int = 1024,
    ) -> None:
        self._open_stream = open_stream
        self._settle = settle
        self._max_batch = max_batch
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._queue: OrderedDict[bytes, _Waiting[Request]] = OrderedDict()
        self._waiting = 0
        self._next_batch = 1
        self._lane: _Lane[Request, Answer] | None = None
        self._lanes: set[_Lane[Request, Answer]] = set()
        self._work = asyncio.Event()
        self._retry_now = asyncio.Event()
        self._failures = 0  # streams lost or refused since one gave an answer
        self._failed_at = 0.0
        self._runner: asyncio.Task[None] | None = None
        self._finishing: set[asyncio.Task[None]] = set()
        self._problem: AgentError | None = None
        self._callers = 0  # that waited when the last answer came
        self._answered_at = 0.0
        self._closed = False
        self.counters = BatcherCounters()

    @property
    def waiting(self) -> int:
        """Operations that wait for an answer now."""
        return self._waiting

    @property
    def in_flight(self) -> int:
        """Batches under way on the present stream."""
        return len(self._lane.batches) if self._lane is not None else 0

    async def submit(self, ticket: Ticket[Request], *, timeout: float) -> object:
        """The output for one request.

        Raises what ``settle`` gave for it, DeadlineError, OverloadedError, or what the stream was refused with.
        """
        if self._closed:
            raise UnavailableError("the agent is stopping")
        if self._waiting >= self._max_waiting:
            raise OverloadedError(f"{self._waiting} operations wait already")
        waiting = _Waiting(ticket, self._loop.time() + timeout, self._loop.create_future())
        self._waiting += 1
        self._queue[ticket.request_id] = waiting
        # The first one wakes the runner, which then waits for the others; each of them need not wake it.
        if len(self._queue) == 1 or self._is_enough():
            self._work.set()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run(), name="vm-agent-batcher")
        try:
            async with asyncio.timeout(timeout):
                return await waiting.outcome
        except TimeoutError:
            raise self._too_late() from None
        finally:
            self._waiting -= 1
            if self._queue.get(ticket.request_id) is waiting:
                del self._queue[ticket.request_id]

    def renew(self) -> None:
        """The next batch goes over a new stream, at once; the present one drains."""
        self._failures = 0
        self._retry_now.set()
        lane, self._lane = self._lane, None
        if lane is None:
            return
        lane.draining = True
        if not lane.batches or sum(1 for other in self._lanes if other.draining) > MAX_DRAINING:
            self._drop(lane, UnavailableError("the stream was replaced"))
        else:
            task = asyncio.create_task(self._finish(lane), name="vm-agent-drain")
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        self._work.set()

    def hand_over(self) -> None:
        """Streams lead elsewhere from now on: what has no answer yet is sent again over the next one, within its callers' time."""
        self._lane = None
        for lane in list(self._lanes):
            self._drop(lane, UnavailableError("the stream was replaced"))
        self._failures = 0
        self._retry_now.set()
        self._work.set()

    async def close(self) -> None:
        """The end of the agent: ends all streams; whoever waits gets UnavailableError."""
        self._closed = True
        error = UnavailableError("the agent is stopping")
        tasks = [lane.reader for lane in self._lanes if lane.reader is not None]
        tasks += self._finishing
        if self._runner is not None:
            self._runner.cancel()
            tasks.append(self._runner)
        for lane in list(self._lanes):
            self._fail([w for batch in lane.batches.values() for w in batch.waiting], error)
            self._drop(lane, error)
        self._fail(list(self._queue.values()), error)
        self._queue.clear()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        """Sends what gathers; one task, started by the first caller."""
        gather_until: float | None = None
        while not self._closed:
            await self._work.wait()
            if not self._queue or self.in_flight >= self._max_in_flight:
                self._work.clear()
                continue
            if self._lane is None:
                await self._pause()
                try:
                    await self._open_lane()
                except UnavailableError as error:
                    self._stream_failed(error)
                except AgentError as error:
                    self._stream_failed(error)
                    self._fail(list(self._queue.values()), error)
                continue
            if not self._is_enough():
                gather_until = gather_until or self._loop.time() + GATHER_TIME
                if self._loop.time() < gather_until:
                    self._work.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(gather_until):
                            await self._work.wait()
                    self._work.set()
                    continue
            gather_until = None
            batch = self._take()
            if batch:
                await self._send(self._lane, batch)

    def _is_enough(self) -> bool:
        """Whether the queue is worth a batch now, or others are expected."""
        if self._lane is None:
            return True
        if not self._lane.batches and self._loop.time() - self._answered_at >= GATHER_TIME:
            return True
        # As many as are under way, and an even share of those who were there a moment ago.
        share = max(-(-self._waiting // self._max_in_flight), self._callers // self._max_in_flight)
        return len(self._queue) >= min(share, self._max_batch)

    async def _pause(self) -> None:
        """Waits before the next stream if the last ones failed: twice as long each time, less what has passed already."""
        if not self._failures:
            return
        pause = min(FIRST_PAUSE * 2 ** min(self._failures - 1, 10), LONGEST_PAUSE) * (0.5 + random() / 2)  # noqa: S311 - spreads attempts
        rest = self._failed_at + pause - self._loop.time()
        self._retry_now.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(rest, 0)):
                await self._retry_now.wait()

    def _stream_failed(self, error: AgentError) -> None:
        self._problem = error
        self._failures += 1
        self._failed_at = self._loop.time()

    async def _open_lane(self) -> None:
        lane = _Lane(await self._open_stream())
        self.counters.streams += 1
        self._lane = lane
        self._lanes.add(lane)
        lane.reader = asyncio.create_task(self._read(lane), name="vm-agent-answers")

    def _take(self) -> list[_Waiting[Request]]:
        taken: list[_Waiting[Request]] = []
        most = self._max_batch
        if self.in_flight:
            even = -(-max(self._callers, self._waiting) // self._max_in_flight)
            most = min(most, max(even, 1))
        while self._queue and len(taken) < most:
            _, waiting = self._queue.popitem(last=False)
            if not waiting.outcome.done():
                taken.append(waiting)
        return taken

    async def _send(self, lane: _Lane[Request, Answer], taken: list[_Waiting[Request]]) -> None:
        now = self._loop.time()
        batch_id, self._next_batch = self._next_batch, self._next_batch + 1
        batch = _Batch(taken, now)
        timeout = max(waiting.deadline for waiting in taken) - now
        batch.timer = self._loop.call_later(max(timeout, 0) + EXPIRY_GRACE, self._expire, lane, batch_id)
        lane.batches[batch_id] = batch
        self.counters.batches += 1
        self.counters.operations += len(taken)
        try:
            await lane.stream.send(batch_id, [waiting.ticket.request for waiting in taken], max(timeout, 0.001))
        except AgentError as error:
            self._drop(lane, error)

    async def _read(self, lane: _Lane[Request, Answer]) -> None:
        try:
            while True:
                batch_id, answer = await lane.stream.receive()
                lane.heard_at = self._loop.time()
                not_now = self._answered(lane, batch_id, answer)
                if not_now is not None:
                    self._drop(lane, not_now)
                    return
                self._problem, self._failures = None, 0
                if lane.draining and not lane.batches:
                    self._drop(lane, UnavailableError("the stream was replaced"))
                    return
        except AgentError as error:
            self._drop(lane, error)
        finally:
            self._drop(lane, UnavailableError("the stream ended"))

    def _answered(self, lane: _Lane[Request, Answer], batch_id: int, answer: Answer) -> UnavailableError | None:
        """What keeps operations of the batch, which wait on, from being executed now; None if nothing does."""
        batch = lane.batches.pop(batch_id, None)
        if batch is None:  # a second answer, or one that came too late
            self.counters.unexpected_answers += 1
            log.debug("answer to an unknown batch", extra={"batch": batch_id})
            return None
        if batch.timer is not None:
            batch.timer.cancel()
        self._callers, self._answered_at = self._waiting, self._loop.time()
        self._work.set()
        live = [waiting for waiting in batch.waiting if not waiting.outcome.done()]
        if not live:
            return None
        outcomes = self._settle([waiting.ticket for waiting in live], answer)
        not_now: UnavailableError | None = None
        again = []
        for waiting in live:
            outcome = outcomes[waiting.ticket.request_id]
            if isinstance(outcome, UnavailableError):
                not_now = outcome
                again.append(waiting)
            elif isinstance(outcome, AgentError):
                waiting.outcome.set_exception(outcome)
            else:
                waiting.outcome.set_result(outcome)
        self._wait_on(again)
        return not_now

    def _wait_on(self, unanswered: Sequence[_Waiting[Request]]) -> None:
        """Back to the front of the queue, in their order."""
        for waiting in reversed(unanswered):
            if not waiting.outcome.done():
                self.counters.resent += 1
                self._queue[waiting.ticket.request_id] = waiting
                self._queue.move_to_end(waiting.ticket.request_id, last=False)

    def _expire(self, lane: _Lane[Request, Answer], batch_id: int) -> None:
        batch = lane.batches.pop(batch_id, None)
        if batch is None:
            return
        log.warning("a batch was not answered in time", extra={"batch": batch_id, "operations": len(batch.waiting)})
        self._work.set()
        if lane.heard_at < batch.sent_at:
            self._drop(lane, UnavailableError("the Secure Middleware is silent"))

    def _drop(self, lane: _Lane[Request, Answer], error: AgentError) -> None:
        """The stream is over: what it did not answer is sent again (lost) or fails (refused)."""
        if lane not in self._lanes:
            return
        self._lanes.discard(lane)
        replaced = self._lane is not lane
        if not replaced:
            self._lane = None
            self._stream_failed(error)
        if lane.reader is not None and lane.reader is not asyncio.current_task():
            lane.reader.cancel()
        lane.stream.abort()
        unanswered = [waiting for batch in lane.batches.values() for waiting in batch.waiting]
        for batch in lane.batches.values():
            if batch.timer is not None:
                batch.timer.cancel()
        lane.batches.clear()
        if (
            isinstance(error, UnavailableError) or replaced
        ):  # an old stream's certificate may be refused while the new one's is good
            self._wait_on(unanswered)
        else:
            self._fail(unanswered, error)
        self._work.set()

    async def _finish(self, lane: _Lane[Request, Answer]) -> None:
        try:
            await lane.stream.finish()
        except AgentError as error:
            self._drop(lane, error)

    def _fail(self, waiting: Sequence[_Waiting[Request]], error: AgentError) -> None:
        for one in waiting:
            if not one.outcome.done():
                one.outcome.set_exception(error)
            self._queue.pop(one.ticket.request_id, None)

    def _too_late(self) -> AgentError:
        if self._problem is not None and self._lane is None:
            late = UnavailableError(f"no answer in time: {self._problem}")
            late.domain, late.reason = self._problem.domain, self._problem.reason
            return late
        return DeadlineError("no answer within the caller's time")
