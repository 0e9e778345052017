"""A VM's session with the grid: one stream of operations, and what heals it within the caller's time.

| what happened | what is done |
| --- | --- |
| the connection broke, or the grid went away | connect again, with pauses; the same operations with the same request ids |
| the grid does not know the session any more, or it ended | one new login, however many callers found out; then the same operations |
| the grid shuts down or cannot write its state, the VM's card is out of service or slow | what it hit, again, as the grid advises |
| the grid has too much to do (RESOURCE_EXHAUSTED) | what it refused, again, not before it advises; without time for that, its refusal |
| anything else | the caller is told |

A retry has the request ids of the first attempt, so the grid gives its first answer, and no operation is executed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc.aio

from gose_client.channel import SESSION_KEY, OperationsChannel
from gose_client.deadline import Deadline
from gose_client.errors import (
    DeadlineError,
    GoseClientError,
    GridRefusedError,
    GridUnavailableError,
    RequestInvalidError,
    SessionClosedError,
)
from gose_client.login import Grant
from gose_client.settings import GoseClientSettings
from gose_client.stream import OperationStream
from secfunet.gose.v1 import operation_pb2
from secfunet.gose.v1 import service_provider_pb2 as pb
from secfunet.rpc.correlation import CORRELATION_KEY
from secfunet.rpc.facts import from_failure
from secfunet.rpc.reasons import Domain, Healing

_log = logging.getLogger(__name__)

BATCH: Final = 64  # operations
# Among them DEADLINE_EXCEEDED, the grid's own bound for a batch: a caller with more time asks again, and gets what was done meanwhile.
_WORTH_RETRYING: Final = (Healing.TIME, Healing.ROOM)
_PROBE_PATIENCE: Final = 2.5  # seconds that a grid that has just come back gets to be reached
_MAX_LOGINS = 3  # in one call: a grid that forgets sessions faster than that is beyond healing


@dataclass(frozen=True)
class BatchAnswer:
    """What became of a batch: containers around results, and what failed."""

    containers: tuple[bytes, ...]
    failures: tuple[operation_pb2.OperationFailure, ...]


@dataclass(slots=True)
class _Batch:
    """What is left to ask for, what came of the rest, and what the grid said last of those that are worth another attempt."""

    todo: list[operation_pb2.Operation]
    containers: list[bytes] = field(default_factory=list)
    failures: list[operation_pb2.OperationFailure] = field(default_factory=list)
    to_retry: list[operation_pb2.OperationFailure] = field(default_factory=list)
    logins: int = 0

    def take(self, answer: pb.ExecuteStreamResponse) -> None:
        self.containers += answer.containers
        self.to_retry = []
        for failure in answer.failures:
            is_transient = from_failure(failure, Domain.GRID).healing in _WORTH_RETRYING
            (self.to_retry if is_transient else self.failures).append(failure)
        ids = {failure.request_id for failure in self.to_retry}
        self.todo = [operation for operation in self.todo if operation.request_id in ids]


class VmSession:
    """What GoseClient.open_session returns. Any number of callers may execute at the same time."""

    def __init__(
        self,
        grant: Grant,
        log_in: Callable[[Deadline], Awaitable[Grant]],
        channel: OperationsChannel,
        settings: GoseClientSettings,
        *,
        clock: Callable[[], float],
        correlation: str = "",
    ) -> None:
        self._grant = grant
        self._log_in = log_in
        self._channel = channel
        self._settings = settings
        self._clock = clock
        self._correlation = correlation
        self._generation = 0
        self._login = asyncio.Lock()
        self._stream: OperationStream | None = None
        self._is_closed = False
        self._old_streams: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<VmSession {self.vmid} on {self.hvid}>"

    @property
    def is_closed(self) -> bool:
        """Whether close was called."""
        return self._is_closed

    @property
    def vmid(self) -> str:
        """Thumbprint of the VM's certificate."""
        return self._grant.vmid

    @property
    def hvid(self) -> str:
        """Thumbprint of the hypervisor's certificate."""
        return self._grant.hvid

    @property
    def expires_at(self) -> float:
        """UTC seconds. A session that ends is replaced by itself as long as the token allows."""
        return self._grant.expires_at

    @property
    def operations(self) -> frozenset[str]:
        """What the VM-Auth-Token allows."""
        return self._grant.operations

    @property
    def container_authority(self) -> bytes:
        """Who signs the containers: X.509, DER."""
        return self._grant.container_authority

    async def execute(
        self, operations: Sequence[operation_pb2.Operation], *, timeout: float, correlation: str = ""
    ) -> BatchAnswer:
        """Runs operations, at most 64 a batch. A failure of one operation is in the answer, not an error.

        Raises GridRefusedError when the grid refuses all of it, DeadlineError after ``timeout`` seconds (unless the last answer said of
        each operation why it has to wait: then that is the answer), GridUntrustedError and
        HypervisorCardError for what waiting does not heal, SessionClosedError after close, RequestInvalidError.
        """
        if not operations:
            raise RequestInvalidError("a batch has at least one operation")
        if len({bytes(operation.request_id) for operation in operations}) != len(operations):
            raise RequestInvalidError("two operations of a batch have the same request id")
        deadline = Deadline(timeout)
        batches = [operations[start : start + BATCH] for start in range(0, len(operations), BATCH)]
        if len(batches) == 1:
            return await self._run(batches[0], deadline, correlation)
        tasks = [asyncio.ensure_future(self._run(batch, Deadline(timeout), correlation)) for batch in batches]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return BatchAnswer(
            tuple(container for answer in answers for container in answer.containers),
            tuple(failure for answer in answers for failure in answer.failures),
        )

    async def probe(self, *, timeout: float) -> int:
        """Does the grid know this session, and does the VM's card live? No operation is done. The grid's clock, UTC seconds.

        Heals what an operation would heal: a lost session by one login, a lost connection within moments. Raises as ``execute``.
        """
        deadline = Deadline(timeout)
        logins, patience = 0, Deadline(min(timeout, _PROBE_PATIENCE))
        async with deadline.enforced():
            while True:
                self._check_open()
                if self._grant.expires_at <= self._clock():
                    await self._renew(self._generation, deadline)
                generation = self._generation
                try:
                    answer = await self._channel.stub.GetSession(
                        pb.GetSessionRequest(), metadata=self._metadata(), timeout=deadline.left
                    )
                except grpc.aio.AioRpcError as rpc_error:
                    error = self._channel.explain(rpc_error)
                    if error.healing is Healing.LOGIN and logins < 1:
                        logins += 1
                        await self._renew(generation, deadline)
                    elif isinstance(error, GridUnavailableError) and patience.left:
                        await deadline.pause(error)
                    else:
                        raise error from rpc_error
                else:
                    return int(answer.time)

    async def close(self) -> None:
        """Ends the session, here at once and at the grid if it can be reached now."""
        if self._is_closed:
            return
        self._is_closed = True
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()
        if self._old_streams:
            await asyncio.wait(self._old_streams)
        try:
            await self._channel.stub.CloseSession(
                pb.CloseSessionRequest(), metadata=self._metadata(), timeout=self._settings.close_timeout
            )
        except grpc.aio.AioRpcError as error:
            # It ends there by itself, in time, or is gone already.
            _log.info("the grid was not told that a session ended: %s", self._channel.explain(error))

    async def _run(
        self, operations: Sequence[operation_pb2.Operation], deadline: Deadline, correlation: str
    ) -> BatchAnswer:
        batch = _Batch(list(operations))
        try:
            async with deadline.enforced():
                while batch.todo:
                    await self._advance(batch, deadline, correlation)
        except DeadlineError:
            # What the grid said last of each operation tells the caller more than that his time is over, and what is done is done.
            if not batch.to_retry:
                raise
        return BatchAnswer(tuple(batch.containers), (*batch.failures, *batch.to_retry))

    async def _advance(self, batch: _Batch, deadline: Deadline, correlation: str) -> None:
        """One attempt, and the pause after it if there must be another. Raises DeadlineError if there is no time for that."""
        generation = self._generation
        stream: OperationStream | None = None
        try:
            stream = await self._open_stream(deadline)
            generation = self._generation
            answer = await stream.execute(batch.todo, correlation)
        except GridUnavailableError as error:
            batch.to_retry = []
            self._discard(stream)
            self._check_open()
            await deadline.pause(error)
        except GridRefusedError as error:
            batch.to_retry = []
            self._discard(stream)
            self._check_open()
            if error.healing is Healing.LOGIN and batch.logins < _MAX_LOGINS:
                batch.logins += 1
                await self._renew(generation, deadline)
            elif error.healing in _WORTH_RETRYING:
                await deadline.pause_or_refuse(error)
            else:
                raise
        else:
            batch.take(answer)
            if batch.to_retry:
                first = batch.to_retry[0]
                cause = GridUnavailableError(first.message, reason=first.reason)
                await deadline.pause(cause, max(failure.retry_after_ms for failure in batch.to_retry) / 1000)

    async def _open_stream(self, deadline: Deadline) -> OperationStream:
        self._check_open()
        if self._grant.expires_at <= self._clock():
            await self._renew(self._generation, deadline)
            self._check_open()
        if self._stream is None or not self._stream.is_open:
            call = self._channel.stub.ExecuteStream(metadata=self._metadata())
            self._stream = OperationStream(
                call,
                self._channel.explain,
                in_flight=self._settings.batches_in_flight,
                stall_timeout=self._settings.stall_timeout,
                heard=self._channel.forget_errors,
                stalled=self._channel.connect_anew,
            )
        return self._stream

    async def _renew(self, generation: int, deadline: Deadline) -> None:
        """Logs in again, unless another caller has done so since ``generation``."""
        async with self._login:
            if self._generation != generation:
                return
            self._check_open()
            grant = await self._log_in(deadline)
            if self._is_closed:
                with contextlib.suppress(grpc.aio.AioRpcError, GoseClientError):
                    await self._channel.stub.CloseSession(
                        pb.CloseSessionRequest(),
                        metadata=((SESSION_KEY, grant.secret),),
                        timeout=self._settings.close_timeout,
                    )
                raise SessionClosedError
            self._grant = grant
            self._generation += 1
            self._discard(self._stream)

    def _discard(self, stream: OperationStream | None) -> None:
        """No longer used for new batches; the first to find out closes it."""
        if stream is None or stream is not self._stream:
            return
        self._stream = None
        task = asyncio.get_running_loop().create_task(stream.close())
        self._old_streams.add(task)
        task.add_done_callback(self._old_streams.discard)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        correlation = ((CORRELATION_KEY, self._correlation),) if self._correlation else ()
        return ((SESSION_KEY, self._grant.secret), *correlation)

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError
