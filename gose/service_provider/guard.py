"""Who calls: decided before every gRPC handler, unary or streaming, by the certificate of the connection and the session.

grpc.aio shows an interceptor no more than method and metadata; the certificate is in the context that the handler gets. So the
interceptor wraps every handler that there is, those that are added later too; only health is answered without a session.
Rules, in their order: the connection has a client certificate; its hypervisor has not too many calls in work; the call names one session;
the session may be used over this connection, now; a unary call has a deadline.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import contextvars
import logging
import secrets
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio

from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.overload import is_overload
from gose.service_provider.status import abort
from gose.sessions import Session, SessionStore
from gose.state import state_unavailable
from secfunet.identity import thumbprint
from secfunet.service.flood_log import FloodLog

log = logging.getLogger(__name__)

SESSION_KEY = "secfunet-session"
CORRELATION_KEY = "secfunet-correlation-id"
CALLS_RETRY_AFTER = 0.5  # seconds
_HEALTH = "/grpc.health.v1.Health/"
_MAX_CORRELATION = 64


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the session, the hypervisor of the connection (thumbprint), the call's correlation id."""

    session: Session
    hvid: str
    correlation: str


_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("gose_caller")


def current_caller() -> Caller:
    """The caller of the handler that runs. Raises LookupError in a handler that the guard did not let through: there is none."""
    return _caller.get()


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg, unused-ignore] # generic only in some stub versions
    """Wraps each handler once; see the module's docstring."""

    def __init__(self, sessions: SessionStore, metrics: Metrics, *, calls_per_hypervisor: int) -> None:
        self._sessions = sessions
        self._metrics = metrics
        self._calls_per_hypervisor = calls_per_hypervisor
        self._calls: Counter[str] = Counter()
        self._overload = FloodLog()
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.aio.ServerInterceptor."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None or method.startswith(_HEALTH):
                return handler
            wrapped = self._wrapped[method] = self._wrap(handler, method)
        return wrapped

    @property
    def calls(self) -> int:
        """How many are in work."""
        return self._calls.total()

    @contextlib.contextmanager
    def _place(self, hvid: str) -> Iterator[None]:
        """One call of this hypervisor, while the context lasts. Raises Refusal TOO_MANY_CALLS: before anything was done for it."""
        if self._calls[hvid] >= self._calls_per_hypervisor:
            raise Refusal(
                Reason.TOO_MANY_CALLS, "this hypervisor has too many calls in work", retry_after=CALLS_RETRY_AFTER
            )
        self._calls[hvid] += 1
        try:
            yield
        finally:
            self._calls[hvid] -= 1
            if not self._calls[hvid]:
                del self._calls[hvid]

    def admit(self, context: grpc.aio.ServicerContext[Any, Any], hvid: str, *, needs_deadline: bool) -> Caller:
        """Raises Refusal."""
        secret = correlation = ""
        secrets_given = 0
        for key, value in context.invocation_metadata() or ():
            if key == SESSION_KEY:
                secret = value if isinstance(value, str) else ""
                secrets_given += 1
            elif key == CORRELATION_KEY and isinstance(value, str):
                correlation = value
        if secrets_given != 1 or not secret:
            raise Refusal(Reason.SESSION_REQUIRED, f"the call must carry one session in its metadata ({SESSION_KEY})")
        session = self._sessions.find(secret)
        self._sessions.check(session, hvid)
        if needs_deadline and context.time_remaining() is None:
            raise Refusal(Reason.DEADLINE_REQUIRED, "a call must have a deadline")
        return Caller(session, hvid, clean_correlation(correlation))

    def _wrap(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._guarded(handler.unary_unary, method, needs_deadline=True),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._guarded(handler.stream_stream, method, needs_deadline=False),
                handler.request_deserializer,
                handler.response_serializer,
            )
        raise TypeError(f"{method} is of a kind that the guard does not know: it would go unguarded")

    def _guarded(
        self, behaviour: Callable[[Any, Any], Any], method: str, *, needs_deadline: bool
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                hvid = peer_thumbprint(context)
                with self._place(hvid):
                    _caller.set(self.admit(context, hvid, needs_deadline=needs_deadline))
                    return await behaviour(request, context)
            except Refusal as refusal:
                self._note(refusal, method, context)
                await abort(context, refusal)
            except grpc.aio.AbortError:
                raise
            except sqlite3.Error as error:
                await abort(context, state_unavailable(error))
            except Exception:
                log.exception("a handler failed", extra={"method": method})
                await abort(context, Refusal(Reason.INTERNAL, "the grid has a fault; see its log"))

        return guarded

    def _note(self, refusal: Refusal, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._metrics.refusals.labels(refusal.reason.value).inc()
        refused = self._overload.count(refusal.reason) if is_overload(refusal) else 1
        if not refused:
            return
        caller = _caller.get(None)
        metadata = {key: value for key, value in context.invocation_metadata() or () if key == CORRELATION_KEY}
        log.warning(
            "call refused",
            extra={
                "method": method,
                "reason": refusal.reason.value,
                "calls": refused,
                "cause": refusal.detail or refusal.message,
                "peer": context.peer(),
                "session": caller.session.name if caller else None,
                "correlation": caller.correlation
                if caller
                else clean_correlation(str(metadata.get(CORRELATION_KEY, ""))),
            },
        )


def peer_thumbprint(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The thumbprint of the connection's client certificate. Raises Refusal CERTIFICATE_REQUIRED."""
    certificates = context.auth_context().get("x509_pem_cert", ())
    # One certificate: with several it would not be clear which one the handshake proved.
    for pem in list(certificates)[:1]:
        found = _thumbprint_of_pem(bytes(pem))
        if found is not None:
            return found
    raise Refusal(Reason.CERTIFICATE_REQUIRED, "the connection has no client certificate")


@lru_cache(maxsize=1024)
def _thumbprint_of_pem(pem: bytes) -> str | None:
    """gRPC gives the leaf as PEM; TLS has verified it, so only the armour is taken off."""
    lines = pem.strip().splitlines()
    if len(lines) < 3 or lines[0] != b"-----BEGIN CERTIFICATE-----" or lines[-1] != b"-----END CERTIFICATE-----":
        return None
    try:
        return thumbprint(base64.b64decode(b"".join(lines[1:-1]), validate=True))
    except binascii.Error:
        return None


def clean_correlation(untrusted: str) -> str:
    """The caller's correlation id if it is printable and short, else a fresh one (16 hexadecimal digits)."""
    if 0 < len(untrusted) <= _MAX_CORRELATION and untrusted.isascii() and untrusted.replace("-", "").isalnum():
        return untrusted
    return secrets.token_hex(8)
