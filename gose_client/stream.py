"""One ExecuteStream: batches go out one after the other without waiting for answers, which come back as they are ready."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

import grpc
import grpc.aio

from gose_client.errors import GoseClientError, GridUnavailableError
from secfunet.gose.v1 import operation_pb2
from secfunet.gose.v1 import service_provider_pb2 as pb

Call = grpc.aio.StreamStreamCall[pb.ExecuteStreamRequest, pb.ExecuteStreamResponse]


class OperationStream:
    """Lives until it is closed or lost; a lost one is thrown away. Only its own two tasks touch the call, because cancelling a read or a
    write of grpc.aio cancels the whole call: a caller that gives up must not take the stream from the others.
    """

    def __init__(
        self,
        call: Call,
        explain: Callable[[grpc.aio.AioRpcError], GoseClientError],
        *,
        in_flight: int,
        stall_timeout: float,
        heard: Callable[[], None] = lambda: None,
        stalled: Callable[[], None] = lambda: None,
    ) -> None:
        """``heard`` is called at every answer, ``stalled`` when the stream is given up because there was none."""
        self._call = call
        self._explain = explain
        self._heard = heard
        self._stalled = stalled
        self._stall_timeout = stall_timeout
        self._places = asyncio.Semaphore(in_flight)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.ExecuteStreamResponse]] = {}
        self._outgoing: asyncio.Queue[pb.ExecuteStreamRequest] = asyncio.Queue()
        self._end: GoseClientError | None = None
        loop = asyncio.get_running_loop()
        self._last_sign = loop.time()
        self._tasks = [loop.create_task(self._read()), loop.create_task(self._write())]
        self._watchdog = loop.call_later(stall_timeout / 4, self._watch)

    @property
    def is_open(self) -> bool:
        return self._end is None

    async def execute(
        self, operations: Sequence[operation_pb2.Operation], correlation: str = ""
    ) -> pb.ExecuteStreamResponse:
        """One batch and its answer. Raises the GoseClientError that ended the stream, if it ends before."""
        await self._places.acquire()
        if self._end is not None:
            self._places.release()
            raise self._end
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._last_sign = loop.time()
        number = next(self._numbers)
        answer: asyncio.Future[pb.ExecuteStreamResponse] = loop.create_future()
        # The place is given back when the answer comes, also if nobody waits for it any more: the grid is still at work on it.
        self._waiting[number] = answer
        self._outgoing.put_nowait(
            pb.ExecuteStreamRequest(batch_id=number, operations=operations, correlation_id=correlation)
        )
        return await answer

    async def close(self) -> None:
        """Ends the stream; whoever waits gets GridUnavailableError."""
        self._lose(GridUnavailableError("the stream was closed", retry_after=None))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call has ended: the reader learns why

    async def _read(self) -> None:
        try:
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.ExecuteStreamResponse):
                    self._lose(GridUnavailableError("the grid ended the stream"))
                    return
                self._last_sign = asyncio.get_running_loop().time()
                self._heard()
                answer = self._waiting.pop(response.batch_id, None)
                if answer is None:
                    continue
                self._places.release()
                if not answer.done():
                    answer.set_result(response)
        except grpc.aio.AioRpcError as error:
            self._lose(self._explain(error))
        except asyncio.CancelledError:
            self._lose(GridUnavailableError("the stream was cancelled"))
            raise

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        if self._waiting and loop.time() - self._last_sign > self._stall_timeout:
            self._lose(GridUnavailableError(f"the grid was silent for {self._stall_timeout:g} s"))
            self._stalled()
        elif self._end is None:
            self._watchdog = loop.call_later(self._stall_timeout / 4, self._watch)

    def _lose(self, error: GoseClientError) -> None:
        if self._end is not None:
            return
        self._end = error
        self._watchdog.cancel()
        self._call.cancel()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        for answer in self._waiting.values():
            self._places.release()
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # seen, also if its caller has given up
        self._waiting.clear()
