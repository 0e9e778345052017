"""What stands in front of every handler of a gRPC server: who calls is established before it runs, and its errors become statuses.

grpc.aio shows an interceptor no more than a call's method and metadata; the connection's certificate is in the context that the handler
gets. So the interceptor wraps every handler that there is, of all four kinds and those that are added later, too. A handler of an unknown
kind is not served at all.

Where a caller's one message has a bound (``Receiving``), the guard reads it itself: gRPC would wait for its end as long as the caller
likes, and holds what has come of it meanwhile.
"""

from __future__ import annotations

import asyncio
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


@dataclass(frozen=True, slots=True)
class Receiving:
    """Of the one message of a call that has one: ``seconds`` from the call's begin until it is there, and its ``size`` in bytes.

    ``refusal`` makes the error of one that is late, too large, or not a message, for ``Refuse``.
    """

    seconds: float
    size: int
    refusal: Callable[[str], Exception]

    async def read(self, context: Context, parse: Callable[[bytes], Any]) -> Any:
        """The message. Raises what ``refusal`` makes."""
        try:
            async with asyncio.timeout(self.seconds):
                untrusted = await context.read()
        except TimeoutError:
            raise self.refusal(f"the request was not there within {self.seconds:g} seconds") from None
        if not isinstance(untrusted, bytes):
            raise self.refusal("there is no request")
        if len(untrusted) > self.size:
            raise self.refusal(f"the request has more than {self.size} bytes")
        try:
            return parse(untrusted)
        except Exception:  # noqa: BLE001 - whatever protobuf makes of such bytes
            raise self.refusal("the request is not well-formed") from None


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg, unused-ignore] # generic only in some stub versions
    """Wraps each handler once; see the module's docstring."""

    def __init__(
        self,
        admit: Admit,
        refuse: Refuse,
        *,
        receiving: Receiving | None = None,
        wasted: Callable[[], None] = lambda: None,
    ) -> None:
        """``wasted``: told of each call that ended before it was answered (its caller, its connection or its time), and of each to a method
        that is not there.
        """
        self._admit = admit
        self._refuse = refuse
        self._wasted = wasted
        self._receiving = receiving
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
                self._wasted()
                return None  # no such method: gRPC answers UNIMPLEMENTED, and nothing of it is kept
            wrapped = self._wrapped[path] = self._wrap(handler, path)
        return wrapped

    def _wrap(self, handler: grpc.RpcMethodHandler[Any, Any], path: str) -> grpc.RpcMethodHandler[Any, Any]:
        how = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
        unary, stream = Method(path, is_unary=True), Method(path, is_unary=False)
        if self._receiving is not None and (handler.unary_unary is not None or handler.unary_stream is not None):
            return self._reading(handler, unary if handler.unary_unary is not None else stream, self._receiving)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._counted(handler.unary_unary, unary), **how)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._counted(handler.stream_unary, unary), **how)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._counted(handler.unary_stream, stream), **how)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._counted(handler.stream_stream, stream), **how)
        raise TypeError(f"{path} is of a kind that the guard does not know: it would go unguarded")

    def _reading(
        self, handler: grpc.RpcMethodHandler[Any, Any], method: Method, receiving: Receiving
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """On the wire a call with one message is a call with a stream of messages of which there is one."""
        parse = handler.request_deserializer or bytes
        behaviour: Callable[..., Any] = (handler.unary_unary if method.is_unary else handler.unary_stream) or parse
        guarded = self._guarded(behaviour, method)

        async def read(_: Any, context: Context) -> Any:
            try:
                request = await receiving.read(context, parse)
            except Exception as error:  # noqa: BLE001 - as in ``guarded``
                await self._refuse(context, method, error, admitted=False)
            else:
                return await guarded(request, context)

        make = grpc.stream_unary_rpc_method_handler if method.is_unary else grpc.stream_stream_rpc_method_handler
        return make(self._counting(read), response_serializer=handler.response_serializer)

    def _counted(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        return self._counting(self._guarded(behaviour, method))

    def _counting(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def counting(request: Any, context: Context) -> Any:
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                self._wasted()
                raise

        return counting

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
