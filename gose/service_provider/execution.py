"""Operations of one VM: led to its card one after another, their results packed into one container for the session's hypervisor.

A batch that reaches the card is a *flight*: a task of its own, which outlives the call that began it. So a caller that gives up, or a
connection that is lost, wastes nothing: the retry with the same request ids joins the flight or gets its kept answer.
Rules, in their order, for each operation: well-formed; allowed by the session's token; not a request id that was used for something
else; an answer that is kept, or in work, is given again; only then the card.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import rsa

from gose.answers import AnswerStore, Question, scope_of
from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.service_provider.card_errors import refusal_of
from gose.sessions import Session
from gose.settings import Limits
from gose.slots.connect import ReadyCard
from gose.slots.errors import SlotError
from gose.slots.rack import Rack
from gose.standing import RegistryStanding
from gose.state import state_unavailable
from secfunet.apdu import ApduError, StatusError
from secfunet.card.binding import Binding, SealedOperation, SealRequest
from secfunet.card.client import KeyRequest
from secfunet.card.errors import CardError, CardGoneError
from secfunet.card.instructions import KeyIns, KeyOperation
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.operation import REQUEST_ID_SIZE, OperationError, request_digest, validate_operation
from secfunet.rpc.correlation import is_correlation
from secfunet.service.flood_log import FloodLog, excerpt

log = logging.getLogger(__name__)

HANDFUL = (
    8  # operations that a card is given at once: it need not wait for us after each, and a deadline is still looked at
)


@dataclass(slots=True)
class BatchAnswer:
    """What a batch came to: sealed containers (each once) and the operations that failed."""

    containers: list[bytes] = field(default_factory=list)
    failures: list[operation_pb2.OperationFailure] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Task:
    """An operation that may go to the card."""

    question: Question
    operation: operation_pb2.Operation
    name: str


class _Flight:
    """Operations of one batch on their way to the card and back; ``outcomes`` is complete when ``task`` is done."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.tasks = tasks
        self.digests = {one.question.request_id: one.question.request_digest for one in tasks}
        self.outcomes: dict[bytes, bytes | Refusal] = {}
        self.task: asyncio.Task[None] | None = None


class Executor:
    """One for a grid."""

    def __init__(
        self,
        rack: Rack,
        answers: AnswerStore,
        standing: RegistryStanding,
        container_key: rsa.RSAPrivateKey,
        limits: Limits,
        metrics: Metrics,
        *,
        profile: ContainerProfile = ContainerProfile.OAEP_PSS_SHA256,
        threads: ThreadPoolExecutor | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rack = rack
        self._answers = answers
        self._standing = standing
        self._container_key = container_key
        self._limits = limits
        self._metrics = metrics
        self._profile = profile
        self._threads = threads
        self._clock = clock
        self._monotonic = monotonic
        self._flood = FloodLog(log)
        self._flights: dict[tuple[bytes, bytes], _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_work(self) -> int:
        """Batches that wait for their card, are in it, or are being sealed."""
        return len(self._tasks)

    async def close(self, timeout: float) -> None:
        """Waits for what is in work, at most ``timeout`` seconds, and ends the rest."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def execute(
        self, session: Session, operations: Sequence[operation_pb2.Operation], *, timeout: float, correlation: str
    ) -> BatchAnswer:
        """Executes one batch within ``timeout`` seconds.

        Raises Refusal for a batch that cannot be answered operation by operation: none or too many, a request id that is none or
        that stands there twice. Whatever else goes wrong is a failure of the operations that it touches.
        """
        deadline = self._monotonic() + timeout
        self._check_batch(operations)
        scope = scope_of(session.vmid, session.hvid)
        refusals: dict[bytes, Refusal] = {}
        tasks = [task for task in (self._examine(session, one, refusals) for one in operations) if task is not None]
        answers: dict[bytes, bytes] = {}
        waiting: dict[bytes, _Flight] = {}
        if tasks:
            answers, reused = self._answers.find(scope, [one.question for one in tasks])
            for request_id in reused:
                refusals[request_id] = _reused()
            new: list[_Task] = []
            for one in tasks:
                request_id = one.question.request_id
                if request_id in answers or request_id in refusals:
                    continue
                flight = self._flights.get((scope, request_id))
                if flight is None:
                    new.append(one)
                elif flight.digests[request_id] == one.question.request_digest:
                    waiting[request_id] = flight
                else:
                    refusals[request_id] = _reused()
            if new:
                flight = self._launch(session, scope, new, deadline)
                waiting.update((one.question.request_id, flight) for one in new)
        if waiting:
            flights = {flight.task for flight in waiting.values() if flight.task is not None}
            await asyncio.wait(flights, timeout=max(0.0, deadline - self._monotonic()))
            for request_id, flight in waiting.items():
                outcome = flight.outcomes.get(request_id) if flight.task and flight.task.done() else None
                if isinstance(outcome, bytes):
                    answers[request_id] = outcome
                else:
                    refusals[request_id] = outcome or Refusal(Reason.DEADLINE_EXCEEDED, "the card was not done in time")
        self._note(session, operations, answers, refusals, correlation)
        return BatchAnswer(
            # Several operations share a container; a dict keeps the order and each one once.
            list(dict.fromkeys(answers.values())),
            [refusal.facts.failure(request_id) for request_id, refusal in refusals.items()],
        )

    def _check_batch(self, operations: Sequence[operation_pb2.Operation]) -> None:
        if not 1 <= len(operations) <= self._limits.batch_operations:
            raise Refusal(Reason.OPERATION_INVALID, f"a batch has 1 to {self._limits.batch_operations} operations")
        ids = {operation.request_id for operation in operations}
        if len(ids) != len(operations) or any(len(one) != REQUEST_ID_SIZE for one in ids):
            raise Refusal(
                Reason.OPERATION_INVALID,
                f"each operation of a batch has a request id of its own, {REQUEST_ID_SIZE} bytes",
            )

    def _examine(
        self, session: Session, untrusted: operation_pb2.Operation, refusals: dict[bytes, Refusal]
    ) -> _Task | None:
        try:
            name = validate_operation(untrusted)
        except OperationError as error:
            refusals[untrusted.request_id] = Refusal(Reason.OPERATION_INVALID, str(error))
            return None
        if name not in session.operations:
            refusals[untrusted.request_id] = Refusal(
                Reason.OPERATION_NOT_ALLOWED, f"the VM-Auth-Token does not allow to {name}"
            )
            return None
        return _Task(Question(untrusted.request_id, request_digest(untrusted)), untrusted, name)

    def _launch(self, session: Session, scope: bytes, tasks: Sequence[_Task], deadline: float) -> _Flight:
        flight = _Flight(tasks)
        flight.task = asyncio.create_task(self._fly(flight, session, scope, deadline))
        self._tasks.add(flight.task)
        keys = [(scope, one.question.request_id) for one in tasks]
        for key in keys:
            self._flights[key] = flight

        def landed(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            for key in keys:
                self._flights.pop(key, None)

        flight.task.add_done_callback(landed)
        return flight

    async def probe(self, session: Session, *, timeout: float) -> None:
        """A sign of life of the session's card, in its turn. Raises Refusal as an operation would be refused."""
        bank = self._rack.vm(session.seid)
        if bank is None:
            raise Refusal(Reason.CARD_NOT_IN_GRID, "the VM's secure element is not in this grid")

        async def ask(card: ReadyCard) -> None:
            if card.binding is not None and card.binding.hvid != session.hvid:
                raise Refusal(Reason.CARD_REFUSED, "the VM's card is bound to another hypervisor")
            await card.client.state()

        try:
            await bank.submit(ask, deadline=self._monotonic() + timeout, operations=1)
        except (SlotError, ApduError, CardError) as error:
            raise refusal_of(error) from error

    async def _fly(self, flight: _Flight, session: Session, scope: bytes, deadline: float) -> None:
        """Never raises: whatever happens is in ``flight.outcomes``."""
        outputs: list[tuple[_Task, bytes]] = []
        try:
            bank = self._rack.vm(session.seid)
            if bank is None:
                raise Refusal(Reason.CARD_NOT_IN_GRID, "the VM's secure element is not in this grid")

            async def work(card: ReadyCard) -> None:
                if card.binding is None:
                    await self._work(card, flight, deadline, outputs)
                else:
                    await self._work_bound(card, card.binding, flight, session, scope, deadline)

            await bank.submit(work, deadline=deadline, operations=len(flight.tasks))
            if outputs:
                await self._seal(flight, session, scope, outputs)
        except Refusal as refusal:
            self._fail(flight, refusal)
        except (SlotError, ApduError, CardError) as error:
            self._fail(flight, refusal_of(error))
        except sqlite3.Error as error:
            # An answer that is not kept is not given: a retry could not be told from a new request.
            self._fail(flight, state_unavailable(error))
        except asyncio.CancelledError:
            self._fail(flight, Refusal(Reason.SHUTTING_DOWN, "the grid shuts down", retry_after=1.0))
        except Exception:  # noqa: BLE001 - one batch's fault is not the grid's
            self._flood.exception("fault", "a batch failed", {"session": session.name})
            self._fail(flight, Refusal(Reason.INTERNAL, "the grid has a fault; see its log"))

    async def _work(
        self, card: ReadyCard, flight: _Flight, deadline: float, outputs: list[tuple[_Task, bytes]]
    ) -> None:
        """In the slot, the card for ourselves. Ends between two handfuls when the deadline has passed."""
        for begin in range(0, len(flight.tasks), HANDFUL):
            if self._monotonic() >= deadline:
                card.figures.failed(Reason.DEADLINE_EXCEEDED.value, len(flight.tasks) - begin)
                return
            handful = flight.tasks[begin : begin + HANDFUL]
            if begin + HANDFUL >= len(flight.tasks):
                card.sending_last()
            # Fewer outcomes than operations: the card was lost, which is the last of them.
            for index, outcome in enumerate(await card.client.operate([_request_of(one) for one in handful]), begin):
                one = flight.tasks[index]
                if isinstance(outcome, bytes):
                    outputs.append((one, outcome))
                    card.figures.did()
                    continue
                refusal = refusal_of(outcome)
                if isinstance(outcome, CardGoneError):
                    # What is done is done: it gets its container. The slot sees by the port that it must connect again.
                    card.port.is_lost = True
                    for rest in flight.tasks[index:]:
                        flight.outcomes[rest.question.request_id] = refusal
                    card.figures.failed(refusal.reason.value, len(flight.tasks) - index)
                    return
                card.figures.failed(refusal.reason.value)
                if refusal.reason is Reason.CARD_UNAVAILABLE:
                    card.port.is_lost = True
                flight.outcomes[one.question.request_id] = refusal

    async def _work_bound(
        self, card: ReadyCard, binding: Binding, flight: _Flight, session: Session, scope: bytes, deadline: float
    ) -> None:
        """Likewise, with a card that seals its results itself: what they are nobody here gets to know."""
        if binding.hvid != session.hvid:
            raise Refusal(Reason.CARD_REFUSED, "the VM's card is bound to another hypervisor", detail=binding.hvid)
        for begin in range(0, len(flight.tasks), HANDFUL):
            if self._monotonic() >= deadline:
                card.figures.failed(Reason.DEADLINE_EXCEEDED.value, len(flight.tasks) - begin)
                return
            handful = flight.tasks[begin : begin + HANDFUL]
            operations = tuple(_sealed_operation_of(one) for one in handful)
            if begin + HANDFUL >= len(flight.tasks):
                card.sending_last()
            try:
                answer = await card.client.seal(SealRequest(int(self._clock()), operations))
            except (CardError, ApduError) as error:
                card.port.is_lost = True
                for one in flight.tasks[begin:]:
                    flight.outcomes[one.question.request_id] = refusal_of(error)
                card.figures.failed(refusal_of(error).reason.value, len(flight.tasks) - begin)
                return
            failed = {request_id: refusal_of(StatusError(sw, KeyIns.SEAL)) for request_id, sw in answer.failures}
            for refusal in failed.values():
                card.figures.failed(refusal.reason.value)
            done = [one.question for one in handful if one.question.request_id not in failed]
            flight.outcomes.update(
                {
                    one.question.request_id: failed[one.question.request_id]
                    for one in handful
                    if one.question not in done
                }
            )
            card.figures.did(len(done))
            if done and answer.container:
                self._answers.keep(scope, done, answer.container)
                flight.outcomes.update({question.request_id: answer.container for question in done})

    async def _seal(self, flight: _Flight, session: Session, scope: bytes, outputs: list[tuple[_Task, bytes]]) -> None:
        began = self._monotonic()
        results = operation_pb2.ResultSet(
            vmid=session.vmid,
            hvid=session.hvid,
            time=int(self._clock()),
            results=[
                operation_pb2.Result(
                    request_id=one.question.request_id, request_digest=one.question.request_digest, output=output
                )
                for one, output in outputs
            ],
        )
        sealer = self._sealer(session)
        plaintext = results.SerializeToString()
        if self._threads is None or len(self._tasks) == 1:
            container = sealer.seal(plaintext)
        else:
            # The signature releases the GIL: beside others, a thread seals while this one goes on; alone, the way there costs more.
            container = await asyncio.get_running_loop().run_in_executor(self._threads, sealer.seal, plaintext)
        questions = [one.question for one, _ in outputs]
        self._answers.keep(scope, questions, container)
        for question in questions:
            flight.outcomes[question.request_id] = container
        self._metrics.sealed.observe(self._monotonic() - began)

    def _sealer(self, session: Session) -> ContainerSealer:
        """The session's own: its content key is known to this hypervisor's card only, and is made anew within bounds."""
        if session.scratch is None:
            identity = self._standing.hypervisor(session.hvid)
            session.scratch = ContainerSealer(
                rsa_key_of(load_certificate(identity.certificate)),
                self._container_key,
                self._profile,
                max_containers=self._limits.containers_per_key,
                max_age=self._limits.container_key_age,
                clock=self._monotonic,
            )
        sealer: ContainerSealer = session.scratch
        return sealer

    @staticmethod
    def _fail(flight: _Flight, refusal: Refusal) -> None:
        for one in flight.tasks:
            flight.outcomes.setdefault(one.question.request_id, refusal)

    def _note(
        self,
        session: Session,
        operations: Sequence[operation_pb2.Operation],
        answers: dict[bytes, bytes],
        refusals: dict[bytes, Refusal],
        correlation: str,
    ) -> None:
        self._metrics.batch.observe(len(operations))
        for operation in operations:
            refusal = refusals.get(operation.request_id)
            kind = operation.WhichOneof("kind") or "none"
            self._metrics.operations.labels(kind, "OK" if refusal is None else refusal.reason.value).inc()
        if refusals and not answers and all(refusal.reason.overload for refusal in refusals.values()):
            self._flood.warning(
                Reason.SLOT_BUSY,
                "operations refused: their cards have too much to do",
                {"session": session.name, "seid": session.seid},
                events=len(refusals),
            )
            return
        facts: dict[str, object] = {
            "correlation": correlation,
            # What the middleware calls each of them; the batch has the id above.
            "calls": {
                one.request_id.hex(): one.correlation_id for one in operations if is_correlation(one.correlation_id)
            },
            "session": session.name,
            "seid": session.seid,
            "done": [request_id.hex() for request_id in answers],
        }
        if not refusals:
            log.info("operations done", extra=facts)
            return
        facts["failed"] = {
            request_id.hex(): excerpt(f"{refusal.reason}: {refusal.detail or refusal.message}")
            for request_id, refusal in refusals.items()
        }
        # What a VM asks for can fail at will: a line a second for the reasons that one batch had together.
        reasons = ", ".join(sorted({refusal.reason.value for refusal in refusals.values()}))
        self._flood.warning(reasons, "operations failed", facts, events=len(refusals))


def _sealed_operation_of(task: _Task) -> SealedOperation:
    operation, scheme, payload = _request_of(task)
    return SealedOperation(operation, scheme, task.question.request_id, payload)


def _request_of(one: _Task) -> KeyRequest:
    operation = one.operation
    match one.name:
        case "sign":
            return KeyOperation.SIGN, operation.sign.scheme, operation.sign.digest
        case "decrypt":
            return KeyOperation.DECRYPT, operation.decrypt.scheme, operation.decrypt.ciphertext
        case "encrypt":
            return KeyOperation.ENCRYPT, operation.encrypt.scheme, operation.encrypt.plaintext
        case other:
            raise AssertionError(f"validated, but unknown: {other}")


def _reused() -> Refusal:
    return Refusal(Reason.REQUEST_ID_REUSED, "this request id was used for another operation")
