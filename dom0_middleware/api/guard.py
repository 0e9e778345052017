"""Who calls, established before any handler of a server runs, and what becomes of its errors: what dom0 asks of the shared ``Guard``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from dom0_middleware.api.errors import facts_of, told_to_guest, told_to_orchestrator
from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.call import Call, current_call
from dom0_middleware.errors import MiddlewareError, Reason, Refused, cause_of
from dom0_middleware.guest import GuestDomain
from dom0_middleware.metrics import Metrics
from dom0_middleware.refusals import RefusalMeter
from secfunet.errors import SecFuNetError
from secfunet.rpc.correlation import CORRELATION_KEY, clean_correlation, guest_id, new_correlation
from secfunet.rpc.facts import abort
from secfunet.rpc.guard import Context, Guard, Method, Receiving
from secfunet.service.audit import AuditLog
from secfunet.service.doorkeeper import DoorFullError
from secfunet.service.flood_log import FloodLog
from secfunet.service.grpc_door import GrpcDoor

log = logging.getLogger(__name__)

MAX_REQUEST = 16 * 1024  # bytes of a call's one request; only a batch of operations is larger, and that is a stream's
RECEIVE_TIMEOUT = 15.0  # seconds for it to come
MAX_CALLS = 256  # at once, of all who speak to one server
MAX_TIMEOUT = 3600.0  # seconds; a longer deadline is none


class Callers:
    """``admit(context, call) -> Call`` raises MiddlewareError to refuse. ``guest``: the domain whose server this is.

    A guest that has itself refused again and again is answered later and later (``refusals.RefusalPace``); for one that gives its calls up
    again and again, ``flooded`` is told why its channel is to be ended. ``max_request``: bytes of a
    call's one request; ``calls``: at once.
    """

    def __init__(
        self,
        admit: Callable[[Context, Call], Call],
        *,
        audit: AuditLog,
        metrics: Metrics,
        guest: GuestDomain | None = None,
        flooded: Callable[[str], None] = lambda why: None,
        max_request: int = MAX_REQUEST,
        calls: int = MAX_CALLS,
        door: GrpcDoor | None = None,
    ) -> None:
        """``door``: what orchestrators come through, where they come by TCP."""
        self._door = door
        self._admit = admit
        self._audit = audit
        self._metrics = metrics
        self._guest = guest
        self._calls, self._max_calls = 0, calls
        self._flooded = flooded
        self._receiving = Receiving(
            RECEIVE_TIMEOUT, max_request, lambda problem: Refused(Reason.REQUEST_INVALID, problem)
        )
        self._vm = guest.uuid if guest is not None else ""
        self._flood_log = FloodLog(log)
        self._refusals = guest.refusals if guest is not None else RefusalMeter(time.monotonic)

    def guard(self) -> Guard:
        """The interceptor."""
        return Guard(self.admit, self.refuse, receiving=self._receiving, wasted=self._note_wasted)

    @contextlib.contextmanager
    def admit(self, context: Context, method: Method) -> Iterator[None]:
        """Raises MiddlewareError."""
        call = self._call(context, method)
        current_call.set(call)
        remaining = context.time_remaining()
        if method.is_unary and (remaining is None or remaining > MAX_TIMEOUT):
            raise Refused(Reason.DEADLINE_REQUIRED, f"a call needs a deadline of at most {MAX_TIMEOUT:g} seconds")
        if self._calls >= self._max_calls:
            raise Refused(
                Reason.TOO_MANY_STREAMS, f"there are {self._max_calls} calls at once already", retry_after=1.0
            )
        call = self._admit(context, call)
        current_call.set(call)
        if self._door is not None:
            try:
                self._door.admitted(context.peer(), call.caller)
            except DoorFullError:
                raise Refused(Reason.TOO_MANY_CALLS, "there are too many connections", retry_after=1.0) from None
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def refuse(self, context: Context, method: Method, error: Exception, *, admitted: bool) -> None:
        """Ends the call for ``error``, whatever it is; a refusal at the door is a decision, and on record."""
        try:
            call = current_call.get()
        except LookupError:  # its request was never there
            call = self._call(context, method)
        if isinstance(error, MiddlewareError) and not admitted:
            self._note(call, method, error)
        correlation = call.correlation
        self._log(method, error, correlation)
        if self._guest is not None:
            await asyncio.sleep(self._guest.refused_calls.delay())
            await abort(context, told_to_guest(error, correlation))
        await abort(context, told_to_orchestrator(error, correlation))

    def _note_wasted(self) -> None:
        """A call that is given up, or of no method, costs what a refused one does, and cannot be answered late."""
        if self._guest is not None and self._guest.wasted_calls.take():
            self._flooded("the guest makes calls for nothing, again and again")

    def _call(self, context: Context, method: Method) -> Call:
        untrusted_id = dict(context.invocation_metadata() or ()).get(CORRELATION_KEY)
        if self._guest is None:
            return Call(method.path, clean_correlation(untrusted_id))
        return Call(method.path, new_correlation(), guest_correlation=guest_id(untrusted_id))

    def _log(self, method: Method, error: Exception, correlation: str) -> None:
        """What was found, for who looks for the id. A traceback only for a fault of this program: no setting makes one."""
        facts = {"method": method.name, "vm": self._vm, "correlation": correlation, "cause": cause_of(error)}
        reason = facts_of(error).reason
        if isinstance(error, SecFuNetError):
            self._flood_log.warning(reason, "a call was refused or failed", facts)
        else:
            self._flood_log.exception(reason, "a call failed", facts, error=error)

    def _note(self, call: Call, method: Method, error: MiddlewareError) -> None:
        """That a refusal cannot be recorded does not make it less of a refusal."""
        self._metrics.refused_calls.labels(str(error.reason)).inc()
        note = self._refusals.admit()
        if note is None:
            return
        with contextlib.suppress(MiddlewareError):
            self._audit.record(
                DomainRecord(
                    Action.CALL,
                    "refused",
                    correlation=call.correlation,
                    guest_correlation=call.guest_correlation,
                    vm=self._vm,
                    name=self._guest.record.name if self._guest is not None else "",
                    caller=call.caller,
                    operation=method.name,
                    reason=str(error.reason),
                    detail="; ".join(part for part in (cause_of(error), note) if part),
                )
            )


def peer_certificate(context: Context) -> bytes:
    """The certificate (PEM) that TLS verified. Raises Refused (CERTIFICATE_REQUIRED)."""
    certificates = context.auth_context().get("x509_pem_cert") or ()
    for certificate in certificates:
        return bytes(certificate)
    raise Refused(Reason.CERTIFICATE_REQUIRED, "this call needs a client certificate")


def timeout_of(context: Context) -> float:
    """Seconds left of a unary call's deadline. Raises Refused (DEADLINE_REQUIRED) if it has none."""
    remaining = context.time_remaining()
    if remaining is None:
        raise Refused(Reason.DEADLINE_REQUIRED, "a call needs a deadline")
    return max(0.001, remaining)
