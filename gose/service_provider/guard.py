"""Who calls: decided before every gRPC handler, unary or streaming, by the certificate of the connection and the session.

Rules, in their order: the connection has a client certificate; its hypervisor has not too many calls in work; the call names one session;
the session may be used over this connection, now; a unary call has a deadline. Health needs no session: in place of it the hypervisor has
to be in good standing, and one look is all there is, no watching.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import contextvars
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import grpc
import grpc.aio

from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.sessions import Session, SessionStore
from gose.state import state_unavailable
from secfunet.identity import thumbprint
from secfunet.rpc.correlation import CORRELATION_KEY, clean_correlation
from secfunet.rpc.facts import abort
from secfunet.rpc.guard import Guard, Method
from secfunet.service.doorkeeper import DoorFullError
from secfunet.service.flood_log import FloodLog
from secfunet.service.grpc_door import GrpcDoor

log = logging.getLogger(__name__)

SESSION_KEY = "secfunet-session"
CALLS_RETRY_AFTER = 0.5  # seconds
_HEALTH = "/grpc.health.v1.Health/"


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


class HypervisorStanding(Protocol):
    """What of ``RegistryStanding`` is asked here."""

    def hypervisor(self, hvid: str) -> object: ...  # raises Refusal HYPERVISOR_REFUSED


class Callers:
    """What the grid's ``Guard`` asks of each call; see the module's docstring."""

    def __init__(
        self,
        sessions: SessionStore,
        standing: HypervisorStanding,
        metrics: Metrics,
        *,
        calls_per_hypervisor: int,
        door: GrpcDoor,
    ) -> None:
        self._door = door
        self._sessions = sessions
        self._standing = standing
        self._metrics = metrics
        self._calls_per_hypervisor = calls_per_hypervisor
        self._calls: Counter[str] = Counter()
        self._flood = FloodLog(log)

    def guard(self) -> Guard:
        """The interceptor."""
        return Guard(self.admit, self.refuse)

    @property
    def calls(self) -> int:
        """How many are in work."""
        return self._calls.total()

    @contextlib.contextmanager
    def admit(self, context: grpc.aio.ServicerContext[Any, Any], method: Method) -> Iterator[None]:
        """The call, while it lasts. Raises Refusal."""
        hvid = peer_thumbprint(context)
        with self._place(hvid):
            if method.path.startswith(_HEALTH):
                self._standing.hypervisor(hvid)
            else:
                _caller.set(self._caller_of(context, hvid, needs_deadline=method.is_unary))
            # Not before: every certificate of the grid's CA gets this far, and a place inside is kept as long as its connection.
            try:
                self._door.admitted(context.peer(), hvid)
            except DoorFullError:
                raise Refusal(
                    Reason.TOO_MANY_CALLS, "there are too many connections", retry_after=CALLS_RETRY_AFTER
                ) from None
            yield

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

    def _caller_of(self, context: grpc.aio.ServicerContext[Any, Any], hvid: str, *, needs_deadline: bool) -> Caller:
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

    async def refuse(
        self, context: grpc.aio.ServicerContext[Any, Any], method: Method, error: Exception, *, admitted: bool
    ) -> None:
        """Ends the call for ``error``, whatever it is."""
        if isinstance(error, Refusal):
            self._note(error, method.path, context)
            await abort(context, error.facts)
        if isinstance(error, sqlite3.Error):
            await abort(context, state_unavailable(error).facts)
        self._flood.exception("fault", "a handler failed", {"method": method.path}, error=error)
        await abort(context, Refusal(Reason.INTERNAL, "the grid has a fault; see its log").facts)

    def _note(self, refusal: Refusal, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._metrics.refusals.labels(refusal.reason.value).inc()
        caller = _caller.get(None)
        metadata = {key: value for key, value in context.invocation_metadata() or () if key == CORRELATION_KEY}
        self._flood.warning(
            refusal.reason.value,
            "call refused",
            {
                "method": method,
                "cause": refusal.detail or refusal.message,
                "peer": self._door.peer(context.peer()),
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
