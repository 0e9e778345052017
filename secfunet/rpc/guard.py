"""What stands in front of every handler of a gRPC server: who calls is established before it runs, and its errors become statuses.

grpc.aio shows an interceptor no more than a call's method and metadata; the connection's certificate is in the context that the handler
gets. So the interceptor wraps every handler that there is, of all four kinds and those that are added later, too. A handler of an unknown
kind is not served at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """``path``: as in ``/package.Service/Name``; ``is_unary``: it has one answer, so a caller waits for its end."""

    path: str
    is_unary: bool

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Admit(Protocol):
    """Called before the handler, entered around it: raises to refuse."""

    def __call__(self, context: Context, method: Method) -> AbstractContextManager[object]: ...


class Refuse(Protocol):
    """Ends the call for ``error`` by ``context.abort``, and writes down what is worth it. ``admitted``: the handler has run."""

    async def __call__(self, context: Context, method: Method, error: Exception, *, admitted: bool) -> None: ...


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg, unused-ignore] # generic only in some stub versions
    """Wraps each handler once; see the module's docstring."""

    def __init__(self, admit: Admit, refuse: Refuse) -> None:
        self._admit = admit
        self._refuse = refuse
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.aio.ServerInterceptor."""
        path = handler_call_details.method
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # no such method: gRPC answers UNIMPLEMENTED, and nothing of it is kept
            wrapped = self._wrapped[path] = self._wrap(handler, path)
        return wrapped

    def _wrap(self, handler: grpc.RpcMethodHandler[Any, Any], path: str) -> grpc.RpcMethodHandler[Any, Any]:
        how = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
        unary, stream = Method(path, is_unary=True), Method(path, is_unary=False)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._guarded(handler.unary_unary, unary), **how)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._guarded(handler.stream_unary, unary), **how)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._guarded(handler.unary_stream, stream), **how)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._guarded(handler.stream_stream, stream), **how)
        raise TypeError(f"{path} is of a kind that the guard does not know: it would go unguarded")

    # The stubs know the handlers of grpc's threads only; those of grpc.aio are given a context of its own.
    def _guarded(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        async def guarded(request: Any, context: Context) -> Any:
            admitted = False
            try:
                with self._admit(context, method):
                    admitted = True
                    outcome = behaviour(request, context)
                    if not hasattr(outcome, "__aiter__"):
                        return await outcome
                    async with contextlib.aclosing(outcome):
                        async for response in outcome:
                            await context.write(response)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - what becomes of it is for ``refuse`` to say, and it is total
                await self._refuse(context, method, error, admitted=admitted)

        return guarded
