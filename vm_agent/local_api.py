"""LocalService: what the programs of this VM ask of the agent. Each call is checked here, executed below, and answered or refused with a
reason.

A refusal is a gRPC status with a google.rpc.ErrorInfo (domain ``agent.secfunet``; reasons in ``errors``) and, where waiting helps, a
RetryInfo.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.operation import OperationError, validate_operation
from secfunet.rpc.correlation import new_correlation
from secfunet.rpc.facts import Facts, abort
from vm_agent.errors import AgentError, OverloadedError, RequestError
from vm_agent.identity import VmIdentity
from vm_agent.local_socket import Caller, share_of
from vm_agent.options import LimitOptions
from vm_agent.origin import Origin, bounded_lines, current_origin

log = logging.getLogger(__name__)

ANSWER_MARGIN = 0.2  # seconds

Context = grpc.aio.ServicerContext[Any, Any]
_PLACEHOLDER_ID = bytes(16)  # until the client to the middleware gives each operation its own


class AgentCore(Protocol):
    """What the API stands on (``server.AgentService``)."""

    @property
    def identity(self) -> VmIdentity: ...  # raises an AgentError while it is not known

    def status(self) -> local_pb2.GetStatusResponse: ...

    async def probed(self, timeout: float) -> local_pb2.GetStatusResponse: ...

    async def settled(self, timeout: float) -> None: ...

    async def operate(self, operation: operation_pb2.Operation, *, timeout: float) -> bytes: ...


class LocalApi(local_pb2_grpc.LocalServiceServicer):
    """See the module."""

    def __init__(
        self, core: AgentCore, limits: LimitOptions, *, who: Callable[[str], Caller | None] = lambda _: None
    ) -> None:
        """``who``: the caller at the other end of the connection of ``ServicerContext.peer()``."""
        self._core = core
        self._who = who
        self._streams: Counter[int | None] = Counter()  # that are open, by the uid of who opened them
        self._limits = limits
        self._may_write = bounded_lines()
        self._waiting: Counter[int | None] = Counter()  # operations, by the uid of who waits

    async def GetIdentity(  # noqa: N802 - named by the protocol
        self, request: local_pb2.GetIdentityRequest, context: Context
    ) -> local_pb2.GetIdentityResponse:
        await self._core.settled(self._timeout(context))
        try:
            identity = self._core.identity
        except AgentError as error:
            origin = self._origin(context)
            self._note(origin, "GetIdentity", error)
            await refuse(context, error, origin)
        return local_pb2.GetIdentityResponse(
            vm_certificate=identity.vm_certificate,
            vmid=identity.vmid,
            operations=identity.operations,
            authorised_until=identity.authorised_until,
        )

    async def GetStatus(  # noqa: N802 - named by the protocol
        self, request: local_pb2.GetStatusRequest, context: Context
    ) -> local_pb2.GetStatusResponse:
        return await self._core.probed(self._timeout(context)) if request.probe else self._core.status()

    async def Sign(  # noqa: N802 - named by the protocol
        self, request: local_pb2.SignRequest, context: Context
    ) -> local_pb2.SignResponse:
        return local_pb2.SignResponse(signature=await self._one(operation_pb2.Operation(sign=request.sign), context))

    async def Decrypt(  # noqa: N802 - named by the protocol
        self, request: local_pb2.DecryptRequest, context: Context
    ) -> local_pb2.DecryptResponse:
        operation = operation_pb2.Operation(decrypt=request.decrypt)
        return local_pb2.DecryptResponse(plaintext=await self._one(operation, context))

    async def Encrypt(  # noqa: N802 - named by the protocol
        self, request: local_pb2.EncryptRequest, context: Context
    ) -> local_pb2.EncryptResponse:
        operation = operation_pb2.Operation(encrypt=request.encrypt)
        return local_pb2.EncryptResponse(ciphertext=await self._one(operation, context))

    async def Operate(  # noqa: N802 - named by the protocol
        self, request_iterator: AsyncIterator[local_pb2.OperateRequest], context: Context
    ) -> AsyncIterator[local_pb2.OperateResponse]:
        """Reads on while fewer than the limit wait; a program that reads no answers is read no further."""
        answers: asyncio.Queue[local_pb2.OperateResponse | None] = asyncio.Queue()
        places = asyncio.Semaphore(self._limits.per_stream)
        running: set[asyncio.Task[None]] = set()

        first = self._origin(context)
        uid = first.uid
        if self._streams[uid] >= self._limits.streams:
            error = OverloadedError("this user has as many streams open as one user may have")
            self._note(first, "Operate", error)
            await refuse(context, error, first)
        self._streams[uid] += 1

        async def execute(request: local_pb2.OperateRequest) -> None:
            answers.put_nowait(await self._one_of_stream(request, replace(first, correlation=new_correlation())))

        async def read() -> None:
            try:
                async for request in request_iterator:
                    await places.acquire()
                    task = asyncio.create_task(execute(request))
                    running.add(task)
                    task.add_done_callback(running.discard)
                while running:
                    await asyncio.wait(running)
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read(), name="vm-agent-local-stream")
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                places.release()
        finally:
            self._streams[uid] -= 1
            if not self._streams[uid]:
                del self._streams[uid]
            for task in (reader, *running):
                task.cancel()

    async def _one(self, operation: operation_pb2.Operation, context: Context) -> bytes:
        origin = self._origin(context)
        try:
            return await self._execute(operation, self._timeout(context), origin)
        except AgentError as error:
            await refuse(context, error, origin)

    def _origin(self, context: Context) -> Origin:
        return Origin(new_correlation(), self._who(context.peer()))

    def _timeout(self, context: Context) -> float:
        remaining = context.time_remaining()
        if remaining is None:
            return self._limits.default_timeout
        # A little earlier than the caller gives up, so that it still learns why.
        return min(remaining - min(remaining * 0.1, ANSWER_MARGIN), self._limits.max_timeout)

    async def _one_of_stream(self, request: local_pb2.OperateRequest, origin: Origin) -> local_pb2.OperateResponse:
        match request.WhichOneof("kind"):
            case "sign":
                operation = operation_pb2.Operation(sign=request.sign)
            case "decrypt":
                operation = operation_pb2.Operation(decrypt=request.decrypt)
            case "encrypt":
                operation = operation_pb2.Operation(encrypt=request.encrypt)
            case _:
                operation = operation_pb2.Operation()
        try:
            output = await self._execute(operation, self._limits.default_timeout, origin)
        except AgentError as error:
            return local_pb2.OperateResponse(id=request.id, failure=told(error, origin).failure())
        return local_pb2.OperateResponse(id=request.id, output=output)

    async def _execute(self, operation: operation_pb2.Operation, timeout: float, origin: Origin) -> bytes:
        kind = operation.WhichOneof("kind") or "none"
        try:
            output = await self._within_bounds(operation, timeout, origin)
        except AgentError as error:
            self._note(origin, kind, error)
            raise
        self._note(origin, kind)
        return output

    def _note(self, origin: Origin, asked: str, error: AgentError | None = None) -> None:
        """A line for each call, with its id, within a bound for each user."""
        if self._may_write(origin):
            facts = {**origin.facts(), "asked": asked}
            if error is None:
                log.info("an operation is done", extra=facts)
            else:
                log.info("refused: %s", error, extra={**facts, "reason": error.reason, "domain": error.domain})

    async def _within_bounds(self, operation: operation_pb2.Operation, timeout: float, origin: Origin) -> bytes:
        uid = origin.uid
        operation.request_id = _PLACEHOLDER_ID
        try:
            validate_operation(operation)
        except OperationError as error:
            raise RequestError(str(error)) from error
        if self._waiting[uid] >= share_of(self._limits.waiting):
            raise OverloadedError("this user has as many operations waiting as one user may have")
        self._waiting[uid] += 1
        current_origin.set(origin)
        try:
            return await self._core.operate(operation, timeout=timeout)
        finally:
            self._waiting[uid] -= 1
            if not self._waiting[uid]:
                del self._waiting[uid]


def told(error: AgentError, origin: Origin) -> Facts:
    """What a program learns of ``error``: its message has an id to look for."""
    facts = error.facts
    return replace(facts, message=origin.told(facts.message))


async def refuse(context: Context, error: AgentError, origin: Origin) -> NoReturn:
    """Ends the call with the error's status, reason and retry time."""
    await abort(context, told(error, origin))
