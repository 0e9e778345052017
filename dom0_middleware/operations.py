"""Operations with a VM's key, in three stages: sanitise what the guest sent, permit it, act.

The rules, in the order in which they are applied to each operation:

1. it is well-formed (``secfunet.operation.validate_operation``), and its request id stands once in the batch;
2. the VM has not more operations in flight than its share;
3. its domain runs, the caller's certificate is current, the VM is not revoked and has a token;
4. policy permits operation and scheme, and the rate;
5. after the session was opened, which may take its time, 3 holds still;
6. the VM-Auth-Token, as the grid took it, covers the operation.

Each decision is one record of the audit log, in the file before anything is done. The container that comes back stays closed here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dom0_middleware.audit import Action, DomainRecord, Program
from dom0_middleware.call import Call
from dom0_middleware.errors import GridFailed, MiddlewareError, Reason, Refused, Unavailable, cause_of
from dom0_middleware.guest import GuestDomain
from dom0_middleware.metrics import Metrics
from dom0_middleware.policy import Policy
from dom0_middleware.sessions import VmSessions
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from secfunet.operation import OperationError, OperationProblem, scheme_name, validate_operation
from secfunet.rpc.correlation import guest_id, new_correlation
from secfunet.rpc.facts import Facts, from_failure
from secfunet.rpc.reasons import Domain
from secfunet.service.audit import AuditLog, Decision
from secfunet.service.flood_log import FloodLog, excerpt

MAX_BATCH = 64
ID_SIZE = 16  # bytes of a request id; no more of a guest's own is kept or sent back
MAX_DIGEST = 64  # bytes; a digest is as long as its scheme's hash
_SAME_ID = "two operations of the batch have the same request id"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why one operation has no result."""

    request_id: bytes
    error: SecFuNetError
    correlation: str


@dataclass
class Outcome:
    results: list[agent_pb2.SealedResults] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class _Sane:
    """An operation that passed the first rule."""

    operation: operation_pb2.Operation
    name: str
    scheme: str
    correlation: str
    origin: agent_pb2.Origin | None = None


class Operations:
    """For one domain. ``limit``: operations of it in flight; ``facts_of``: what of an error leaves the daemon."""

    def __init__(
        self,
        guest: GuestDomain,
        *,
        policy: Policy,
        sessions: VmSessions,
        audit: AuditLog,
        metrics: Metrics,
        limit: int,
        facts_of: Callable[[Exception], Facts],
    ) -> None:
        self._guest = guest
        self._policy = policy
        self._sessions = sessions
        self._audit = audit
        self._metrics = metrics
        self._limit = limit
        self._facts_of = facts_of
        self._flood_log = FloodLog(log)

    async def perform(
        self,
        call: Call,
        untrusted: Sequence[operation_pb2.Operation],
        *,
        timeout: float,
        batch: int | None = None,
        untrusted_origins: Sequence[agent_pb2.Origin] = (),
    ) -> Outcome:
        """Every operation of the batch ends as a result or as a failure. Raises Refused (REQUEST_INVALID) for a batch of a wrong size."""
        if not 1 <= len(untrusted) <= MAX_BATCH:
            raise Refused(Reason.REQUEST_INVALID, f"a batch has 1 to {MAX_BATCH} operations")
        guest = self._guest
        guest.operations_in_flight += len(untrusted)
        try:
            return await self._perform(_Batch(self, call, batch), untrusted, untrusted_origins, timeout)
        finally:
            guest.operations_in_flight -= len(untrusted)

    async def _perform(
        self,
        batch: _Batch,
        untrusted: Sequence[operation_pb2.Operation],
        untrusted_origins: Sequence[agent_pb2.Origin],
        timeout: float,
    ) -> Outcome:
        permitted = batch.permit(batch.sanitise(untrusted, untrusted_origins))
        if permitted:
            try:
                session = await self._sessions.session(
                    self._guest.record, timeout=timeout, correlation=batch.correlation
                )
            except SecFuNetError as error:
                batch.fail(permitted, error, "failed")
                return batch.outcome
            # From here to the call of the grid nothing is awaited: what is looked at now holds when it is done.
            permitted = batch.authorise(batch.still(permitted), frozenset(session.operations))
        if permitted:
            await self._act(batch, permitted, timeout)
        return batch.outcome

    async def _act(self, batch: _Batch, permitted: list[_Sane], timeout: float) -> None:
        try:
            # On record before it is done.
            self._audit.flush()
            with self._metrics.batch_seconds.time():
                results, failures = await self._sessions.execute(
                    self._guest.record,
                    [sane.operation for sane in permitted],
                    timeout=timeout,
                    correlation=batch.correlation,
                )
        except SecFuNetError as error:
            batch.fail(permitted, error, "failed")
            return
        batch.outcome.results.extend(results)
        by_id = {sane.operation.request_id: sane for sane in permitted}
        for failure in failures:
            sane = by_id.get(failure.request_id)
            if sane is not None:
                batch.fail([sane], GridFailed(from_failure(failure, Domain.GRID)), "failed")


class _Batch:
    """One batch on its way through the rules."""

    def __init__(self, room: Operations, call: Call, number: int | None) -> None:
        self._room = room
        self._call = call
        self._number = number
        # A stream is one call that carries many: each batch has an id of its own, and each operation of it.
        self.correlation = call.correlation if number is None else new_correlation()
        self.outcome = Outcome()

    def sanitise(
        self, untrusted: Sequence[operation_pb2.Operation], untrusted_origins: Sequence[agent_pb2.Origin]
    ) -> list[_Sane]:
        sane: list[_Sane] = []
        seen: set[bytes] = set()
        origins: Sequence[agent_pb2.Origin | None] = [None] * len(untrusted)
        if len(untrusted_origins) == len(untrusted):
            origins = untrusted_origins
        for number, (operation, origin) in enumerate(zip(untrusted, origins, strict=True), 1):
            operation.correlation_id = self.correlation if self._number is None else f"{self.correlation}-{number}"
            try:
                name = validate_operation(operation)
                if operation.request_id in seen:
                    raise OperationError(OperationProblem.REQUEST_ID, _SAME_ID)
            except OperationError as error:
                self._refuse_unsound(operation, origin, error)
                continue
            seen.add(operation.request_id)
            sane.append(_Sane(operation, name, scheme_name(operation), operation.correlation_id, origin))
        return sane

    def permit(self, sane: list[_Sane]) -> list[_Sane]:
        permitted = []
        for one in sane:
            try:
                self._require_permitted(one)
            except MiddlewareError as error:
                self.fail([one], error, "refused")
            else:
                permitted.append(one)
        return permitted

    def still(self, permitted: list[_Sane]) -> list[_Sane]:
        """``permitted`` if the domain, its certificate and the VM's right are what they were when it was permitted, else nothing."""
        try:
            self._require_domain()
        except MiddlewareError as error:
            self.fail(permitted, error, "refused")
            return []
        return permitted

    def authorise(self, permitted: list[_Sane], token_operations: frozenset[str]) -> list[_Sane]:
        authorised = []
        for one in permitted:
            if one.name in token_operations:
                try:
                    self._record(one, "permitted")
                except Unavailable as error:
                    self.outcome.failures.append(Failure(one.operation.request_id, error, one.correlation))
                    continue
                authorised.append(one)
            else:
                message = f"the VM-Auth-Token does not cover '{one.name}'"
                self.fail([one], Refused(Reason.OPERATION_NOT_ALLOWED, message), "refused")
        return authorised

    def fail(self, sane: Sequence[_Sane], error: SecFuNetError, decision: Decision) -> None:
        for one in sane:
            self.outcome.failures.append(Failure(one.operation.request_id, error, one.correlation))
            self._record_quietly(one, decision, error)

    def _require_permitted(self, one: _Sane) -> None:
        guest = self._room._guest
        if guest.operations_in_flight > self._room._limit:
            raise Refused(Reason.TOO_MANY_OPERATIONS, "this VM has too many operations in flight", retry_after=0.05)
        self._require_domain()
        self._room._policy.permit(guest.subject, one.name, one.scheme)

    def _require_domain(self) -> None:
        guest = self._room._guest
        guest.require_running()
        if self._call.certificate is None:
            raise Refused(Reason.CERTIFICATE_REQUIRED, "operations need a certificate")
        guest.require_current(self._call.certificate)
        guest.require_authorised()

    def _refuse_unsound(
        self, operation: operation_pb2.Operation, origin: agent_pb2.Origin | None, problem: OperationError
    ) -> None:
        # The guest may know what is wrong with what it sent: these are words about its own request.
        error = Refused(Reason.OPERATION_INVALID, str(problem), told=str(problem))
        unsound = _Sane(operation, "unsound", "", operation.correlation_id, origin)
        self.outcome.failures.append(Failure(operation.request_id[:ID_SIZE], error, unsound.correlation))
        self._record_quietly(unsound, "refused", error)

    def _record_quietly(self, one: _Sane, decision: Decision, error: SecFuNetError) -> None:
        """A refusal that cannot be recorded is a refusal still."""
        room = self._room
        facts, cause = room._facts_of(error), cause_of(error)
        room._flood_log.warning(
            facts.reason,
            f"an operation {'was refused' if decision == 'refused' else decision}",
            {"vm": room._guest.uuid, "correlation": one.correlation, "domain": facts.domain, "cause": cause},
        )
        note = room._guest.refusals.admit()
        if note is None:
            room._metrics.decisions.labels(one.name, decision, facts.reason).inc()
            return
        try:
            self._record(one, decision, facts, "; ".join(part for part in (cause, note) if part))
        except Unavailable:
            self._room._metrics.refused_calls.labels(Reason.AUDIT_UNAVAILABLE).inc()

    def _record(self, one: _Sane, decision: Decision, facts: Facts | None = None, detail: str = "") -> None:
        room = self._room
        room._metrics.decisions.labels(one.name, decision, facts.reason if facts is not None else "").inc()
        room._audit.record(
            DomainRecord(
                Action.OPERATION,
                decision,
                correlation=one.correlation,
                guest_correlation=guest_id(one.origin.correlation_id) if one.origin else self._call.guest_correlation,
                program=_program(one.origin) if one.origin else None,
                vm=room._guest.uuid,
                name=room._guest.record.name,
                operation=one.name,
                scheme=one.scheme,
                request=one.operation.request_id[:ID_SIZE].hex(),
                digest=one.operation.sign.digest[:MAX_DIGEST].hex() if one.name == "sign" else "",
                reason=facts.reason if facts is not None else "",
                domain=facts.domain if facts is not None else "",
                batch=self._number,
                detail=detail,
            )
        )


def _program(untrusted: agent_pb2.Origin) -> Program:
    """What the agent says of the program that asked: the guest's word, bounded and escaped."""
    return Program(uid=untrusted.uid, pid=untrusted.pid, executable=excerpt(untrusted.executable))
