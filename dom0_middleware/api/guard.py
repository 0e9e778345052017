"""What stands in front of every handler of a server: who calls is established before it runs, and its errors become statuses.

An interceptor sees only a call's method and metadata, so it wraps the handler: all four kinds, and a handler of
no known kind is not served at all.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from dom0_middleware.api.errors import STATUS_KEY, facts_of
from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.call import CORRELATION_KEY, Call, correlation_id, current_call
from dom0_middleware.errors import MiddlewareError, Reason, Refused
from dom0_middleware.guest import GuestDomain
from dom0_middleware.metrics import Metrics
from dom0_middleware.refusals import RefusalMeter
from secfunet.service.audit import AuditLog

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
MAX_TIMEOUT = 3600.0  # seconds; a longer deadline is none


class Guard(grpc.aio.ServerInterceptor):
    """``admit(context, call) -> Call`` raises MiddlewareError to refuse. ``guest``: the domain whose server this is."""

    def __init__(
        self,
        admit: Callable[[Context, Call], Call],
        *,
        audit: AuditLog,
        metrics: Metrics,
        guest: GuestDomain | None = None,
    ) -> None:
        self._admit = admit
        self._audit = audit
        self._metrics = metrics
        self._guest = guest
        self._vm = guest.uuid if guest is not None else ""
        self._refusals = guest.refusals if guest is not None else RefusalMeter(time.monotonic)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler  # no such method: gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        how = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), **how)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, method), **how)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, method), **how)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary, method), **how)
        raise TypeError(f"{method} has a handler of no known kind")

    def _unary(self, behaviour: Any, method: str) -> Any:
        async def guarded(request: Any, context: Context) -> Any:
            try:
                self._enter(context, method, deadline_required=True)
                return await behaviour(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the table is total
                await self._abort(context, method, error)

        return guarded

    def _stream(self, behaviour: Any, method: str) -> Any:
        async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                self._enter(context, method, deadline_required=False)
                async with contextlib.aclosing(_responses(behaviour, request, context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the table is total
                await self._abort(context, method, error)

        return guarded

    def _enter(self, context: Context, method: str, *, deadline_required: bool) -> None:
        metadata = dict(context.invocation_metadata() or ())
        call = Call(method, correlation_id(metadata.get(CORRELATION_KEY)))
        current_call.set(call)
        remaining = context.time_remaining()
        if deadline_required and (remaining is None or remaining > MAX_TIMEOUT):
            raise _RefusedAtTheDoor(
                Refused(Reason.DEADLINE_REQUIRED, f"a call needs a deadline of at most {MAX_TIMEOUT:g} seconds")
            )
        try:
            current_call.set(self._admit(context, call))
        except MiddlewareError as error:
            raise _RefusedAtTheDoor(error) from error

    async def _abort(self, context: Context, method: str, error: Exception) -> None:
        if isinstance(error, _RefusedAtTheDoor):
            error = error.cause
            self._note(method, error)
        facts = facts_of(error)
        if facts.code is grpc.StatusCode.INTERNAL:
            log.error("a call failed", exc_info=error, extra={"method": method, "vm": self._vm})
        status = facts.status().SerializeToString()
        await context.abort(facts.code, facts.message, trailing_metadata=((STATUS_KEY, status),))

    def _note(self, method: str, error: MiddlewareError) -> None:
        """A refusal at the door is a decision, too; that it cannot be recorded does not make it less of a refusal."""
        self._metrics.refused_calls.labels(str(error.reason)).inc()
        call = current_call.get()
        note = self._refusals.admit()
        if note is None:
            return
        with contextlib.suppress(MiddlewareError):
            self._audit.record(
                DomainRecord(
                    Action.CALL,
                    "refused",
                    correlation=call.correlation,
                    vm=self._vm,
                    name=self._guest.record.name if self._guest is not None else "",
                    caller=call.caller,
                    operation=method.rpartition("/")[2],
                    reason=str(error.reason),
                    detail="; ".join(part for part in (error.detail, note) if part),
                )
            )


class _RefusedAtTheDoor(Exception):
    """A refusal before the handler ran."""

    def __init__(self, cause: MiddlewareError) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def _responses(behaviour: Any, request: Any, context: Context) -> AsyncGenerator[Any, None]:
    """Responses of a streaming handler of either style: an asynchronous generator, or a coroutine that writes to the context."""
    outcome = behaviour(request, context)
    if hasattr(outcome, "__aiter__"):
        async with contextlib.aclosing(outcome):
            async for response in outcome:
                yield response
    else:
        await outcome


def peer_certificate(context: Context) -> bytes:
    """The certificate (PEM) that TLS verified. Raises Refused (CERTIFICATE_MISSING)."""
    certificates = context.auth_context().get("x509_pem_cert") or ()
    for certificate in certificates:
        return bytes(certificate)
    raise Refused(Reason.CERTIFICATE_MISSING, "this call needs a client certificate")


def timeout_of(context: Context) -> float:
    """Seconds left of a unary call's deadline. Raises Refused (DEADLINE_REQUIRED) if it has none."""
    remaining = context.time_remaining()
    if remaining is None:
        raise Refused(Reason.DEADLINE_REQUIRED, "a call needs a deadline")
    return max(0.001, remaining)
