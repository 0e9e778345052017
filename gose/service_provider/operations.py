"""The gRPC handlers of ServiceProviderService: what they are given was admitted by the guard."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.service_provider.execution import BatchAnswer, Executor
from gose.service_provider.guard import Caller, current_caller
from gose.sessions import SessionStore
from gose.settings import Limits
from secfunet.gose.v1 import service_provider_pb2 as pb
from secfunet.gose.v1 import service_provider_pb2_grpc as pb_grpc
from secfunet.rpc.correlation import clean_correlation
from secfunet.rpc.facts import from_failure
from secfunet.rpc.reasons import Domain, find_reason

Context = grpc.aio.ServicerContext[Any, Any]

# A unary batch of which nothing was done for one of these reasons ends with that status instead of listing it for each operation.
_WHOLE_BATCH = {
    Reason.STATE_UNAVAILABLE,
    Reason.SLOT_BUSY,
    Reason.CARD_UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED,
    Reason.SHUTTING_DOWN,
}
# Time to get an answer out before the caller's deadline cuts the call.
_MARGIN = 0.02
_PROBE_TIMEOUT = 5.0  # seconds for a card's sign of life, the jobs before it included


class ServiceProvider(pb_grpc.ServiceProviderServiceServicer):
    """See the proto."""

    def __init__(
        self,
        executor: Executor,
        sessions: SessionStore,
        limits: Limits,
        metrics: Metrics,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._sessions = sessions
        self._limits = limits
        self._metrics = metrics
        self._monotonic = monotonic
        self._open: Counter[str] = Counter()
        self._streams: set[_Stream] = set()
        self._is_draining = False

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:  # noqa: N802 - gRPC's name
        """One batch within the call's deadline."""
        caller = current_caller()
        left = context.time_remaining() or 0.0
        timeout = max(0.0, min(left, self._limits.longest_deadline) - _MARGIN)
        answer = await self._executor.execute(
            caller.session, request.operations, timeout=timeout, correlation=caller.correlation
        )
        if not answer.containers:
            _raise_if_nothing_was_done(answer)
        return pb.ExecuteResponse(containers=answer.containers, failures=answer.failures)

    # gRPC's stubs only know streaming handlers that are generators; grpc.aio also has this kind, which reads and writes by itself.
    async def ExecuteStream(  # type: ignore[override]  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[pb.ExecuteStreamRequest], context: Context
    ) -> None:
        """Batches, several in work at the same time; a caller that does not read its answers is not read from either."""
        caller = current_caller()
        if self._open[caller.hvid] >= self._limits.streams_per_hypervisor:
            raise Refusal(Reason.TOO_MANY_STREAMS, "this hypervisor has too many streams open", retry_after=1.0)
        self._open[caller.hvid] += 1
        self._metrics.streams.inc()
        stream = _Stream(self._executor, self._sessions, self._limits, caller, context)
        self._streams.add(stream)
        try:
            if self._is_draining:
                stream.drain()
            await stream.run()
        finally:
            self._streams.discard(stream)
            self._metrics.streams.dec()
            self._open[caller.hvid] -= 1
            if not self._open[caller.hvid]:
                del self._open[caller.hvid]

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def drain(self) -> None:
        """The grid shuts down: streams take no more batches, answer those that they have, and end."""
        self._is_draining = True
        for stream in self._streams:
            stream.drain()

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:  # noqa: N802 - gRPC's name
        """What the session is worth, if its card gives a sign of life."""
        session = current_caller().session
        left = min(context.time_remaining() or 0.0, _PROBE_TIMEOUT)
        await self._executor.probe(session, timeout=max(0.0, left - _MARGIN))
        return pb.GetSessionResponse(
            vmid=session.vmid,
            hvid=session.hvid,
            expires_at=int(session.expires_at),
            operations=sorted(session.operations),
            time=int(time.time()),
        )

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:  # noqa: N802 - gRPC's name
        """Ends it."""
        self._sessions.close(current_caller().session)
        return pb.CloseSessionResponse()


class _Stream:
    """One stream: reads while a place is free, answers in the order in which answers are ready."""

    def __init__(
        self, executor: Executor, sessions: SessionStore, limits: Limits, caller: Caller, context: Context
    ) -> None:
        self._executor = executor
        self._sessions = sessions
        self._limits = limits
        self._caller = caller
        self._context = context
        # A place is given back when the answer is written: so nothing piles up behind a slow reader.
        self._places = asyncio.Semaphore(limits.stream_batches)
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def drain(self) -> None:
        """Reads no more; ``run`` ends when what was read is answered."""
        self._drained.set()

    async def run(self) -> None:
        """Until the caller has no more batches, the session ends (Refusal), the grid shuts down (Refusal), or the connection is lost."""
        reader = asyncio.create_task(self._read())
        drained = asyncio.create_task(self._drained.wait())
        try:
            watched: set[asyncio.Future[Any]] = {reader, drained, self._failed}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            ended_by_caller = reader.done()
            if ended_by_caller:
                reader.result()
            else:
                reader.cancel()
            while self._tasks and not self._failed.done():
                watched = {*self._tasks, self._failed}
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            if not ended_by_caller:
                raise Refusal(Reason.SHUTTING_DOWN, "the grid shuts down", retry_after=1.0)
        finally:
            for task in (reader, drained, *self._tasks):
                task.cancel()
            await asyncio.gather(reader, drained, *self._tasks, return_exceptions=True)
            self._failed.cancel()

    async def _read(self) -> None:
        while True:
            await self._places.acquire()
            request = await self._context.read()
            if request is grpc.aio.EOF:
                return
            # At every batch: the session may have ended, or been revoked, since the stream began.
            self._sessions.check(self._caller.session, self._caller.hvid)
            task = asyncio.create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: pb.ExecuteStreamRequest) -> None:
        correlation = clean_correlation(request.correlation_id) if request.correlation_id else self._caller.correlation
        try:
            try:
                answer = await self._executor.execute(
                    self._caller.session,
                    request.operations,
                    timeout=self._limits.batch_timeout,
                    correlation=correlation,
                )
            except Refusal as refusal:
                # A batch that cannot be read as one: its operations fail, the stream goes on.
                ids = [operation.request_id[:64] for operation in request.operations[: self._limits.batch_operations]]
                answer = BatchAnswer(failures=[refusal.facts.failure(request_id) for request_id in ids or [b""]])
            response = pb.ExecuteStreamResponse(
                batch_id=request.batch_id, containers=answer.containers, failures=answer.failures
            )
            async with self._writing:
                await self._context.write(response)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - it ends the stream, where it is told apart
            if not self._failed.done():
                self._failed.set_exception(error)
        finally:
            self._places.release()


def _raise_if_nothing_was_done(answer: BatchAnswer) -> None:
    reasons = {failure.reason for failure in answer.failures}
    reason = find_reason(next(iter(reasons))) if len(reasons) == 1 else None
    if reason is not None and reason in _WHOLE_BATCH:
        first = answer.failures[0]
        raise Refusal(reason, first.message, retry_after=from_failure(first, Domain.GRID).retry_after)
