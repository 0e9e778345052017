"""The door for the agent of one domain: mutual TLS, the guard has established that the certificate is this domain's and current."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from dom0_middleware.api.enrolment import identity_as_known, require_renewal_rate
from dom0_middleware.api.errors import facts_of, told_to_guest
from dom0_middleware.api.guard import MAX_TIMEOUT, timeout_of
from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.call import Call, current_call
from dom0_middleware.enrolment import key_hash
from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable, cause_of
from dom0_middleware.guest import GuestDomain, Phase
from dom0_middleware.guest_authority import GuestAuthority
from dom0_middleware.identity import Identities
from dom0_middleware.key_checks import KeyChecks
from dom0_middleware.operations import ID_SIZE, MAX_BATCH, Operations
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2 as pb
from secfunet.middleware.v1 import agent_pb2_grpc
from secfunet.rpc.guard import Context
from secfunet.service.audit import AuditLog
from secfunet.service.shared import Shared

BATCHES_IN_FLIGHT = 16  # of one stream; more wait unread
PROBE_STANDS = 1.0  # seconds for which the answer to a probe stands, a refusal too
PROBE_TIMEOUT = 8.0  # seconds
_WATCH_TIMEOUT = 10.0  # seconds that one look at the identity may take
_WATCH_INTERVAL = 30.0  # seconds after which it is looked at again unasked
_WATCH_RETRY = 2.0  # the same, while the grid does not answer


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """Of ``guest`` only: no field of a request says who calls."""

    def __init__(
        self,
        guest: GuestDomain,
        *,
        operations: Operations,
        identities: Identities,
        authority: GuestAuthority,
        audit: AuditLog,
        key_checks: KeyChecks,
    ) -> None:
        self._guest = guest
        self._probe = Shared(self._ask_for_life, keep=PROBE_STANDS)
        self._key_checks = key_checks
        self._operations = operations
        self._identities = identities
        self._authority = authority
        self._audit = audit

    async def RenewCertificate(  # noqa: N802 - gRPC's name
        self, request: pb.RenewCertificateRequest, context: Context
    ) -> pb.RenewCertificateResponse:
        call = current_call.get()
        require_renewal_rate(self._guest)
        key = await self._key_checks.key_of(self._guest, request.certificate_signing_request)
        # Again, after the wait.
        self._guest.require_running()
        self._require_current(call)
        certificate, facts = self._authority.issue_agent(key, self._guest.uuid)
        self._audit.record(
            DomainRecord(
                Action.RENEW,
                "permitted",
                correlation=call.correlation,
                vm=self._guest.uuid,
                name=self._guest.record.name,
                detail=f"certificate {facts.serial:x}",
            )
        )
        self._audit.flush()
        self._guest.make_current(facts, key_hash(key), renewed=call.certificate.serial if call.certificate else None)
        return pb.RenewCertificateResponse(certificate=certificate)

    async def _ask_for_life(self) -> int:
        self._guest.require_running()
        self._guest.require_authorised()
        return await self._identities.probe(
            self._guest, timeout=PROBE_TIMEOUT, correlation=current_call.get().correlation
        )

    async def GetIdentity(  # noqa: N802 - gRPC's name
        self, request: pb.GetIdentityRequest, context: Context
    ) -> pb.GetIdentityResponse:
        call = current_call.get()
        try:
            identity = await self._identities.identity(
                self._guest, timeout=timeout_of(context), correlation=call.correlation
            )
        except SecFuNetError as error:
            self._note(call, error)
            raise
        return pb.GetIdentityResponse(identity=identity)

    async def Probe(self, request: pb.ProbeRequest, context: Context) -> pb.ProbeResponse:  # noqa: N802 - gRPC's name
        try:
            time_there = await self._probe.answer(timeout_of(context))
        except TimeoutError:
            raise Unavailable(Reason.DEADLINE_EXCEEDED, "the grid did not answer in time") from None
        return pb.ProbeResponse(time=time_there)

    async def WatchIdentity(  # noqa: N802 - gRPC's name
        self, request: pb.WatchIdentityRequest, context: Context
    ) -> AsyncIterator[pb.WatchIdentityResponse]:
        call, last = current_call.get(), None
        # An honest agent holds one of these for as long as it lives.
        with self._guest.stream(), self._guest.presence.stream():
            while self._guest.phase is not Phase.ENDED:
                self._require_current(call)
                version = self._guest.identity_version
                identity = await identity_as_known(self._identities, self._guest, _WATCH_TIMEOUT)
                self._require_current(call)
                if identity != last:
                    last = identity
                    yield pb.WatchIdentityResponse(identity=identity)
                complete = bool(identity.container_authority) or self._guest.record.revoked
                await self._guest.wait_for_change(version, timeout=_WATCH_INTERVAL if complete else _WATCH_RETRY)
        raise Refused(Reason.DOMAIN_NOT_RUNNING, "the domain of this channel stopped")

    async def Sign(self, request: pb.SignRequest, context: Context) -> pb.SignResponse:  # noqa: N802 - gRPC's name
        operation = operation_pb2.Operation(request_id=request.request_id, sign=request.sign)
        return pb.SignResponse(results=await self._one(operation, context))

    async def Decrypt(  # noqa: N802 - gRPC's name
        self, request: pb.DecryptRequest, context: Context
    ) -> pb.DecryptResponse:
        operation = operation_pb2.Operation(request_id=request.request_id, decrypt=request.decrypt)
        return pb.DecryptResponse(results=await self._one(operation, context))

    async def Encrypt(  # noqa: N802 - gRPC's name
        self, request: pb.EncryptRequest, context: Context
    ) -> pb.EncryptResponse:
        operation = operation_pb2.Operation(request_id=request.request_id, encrypt=request.encrypt)
        return pb.EncryptResponse(results=await self._one(operation, context))

    async def Operate(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[pb.OperateRequest], context: Context
    ) -> AsyncIterator[pb.OperateResponse]:
        with self._guest.stream():
            async with contextlib.aclosing(_Pipeline(self._batch).run(request_iterator)) as responses:
                async for response in responses:
                    yield response

    async def _one(self, operation: operation_pb2.Operation, context: Context) -> pb.SealedResults:
        outcome = await self._operations.perform(current_call.get(), [operation], timeout=timeout_of(context))
        for failure in outcome.failures:
            raise failure.error
        for results in outcome.results:
            return results
        raise MiddlewareError(Reason.INTERNAL, "the grid answered without a result")

    async def _batch(self, request: pb.OperateRequest) -> pb.OperateResponse:
        call = current_call.get()
        # A stream outlives the certificate it was opened with; its batches do not.
        self._require_current(call)
        if not 1 <= len(request.operations) <= MAX_BATCH:
            raise Refused(Reason.REQUEST_INVALID, f"a batch has 1 to {MAX_BATCH} operations")
        response = pb.OperateResponse(batch_id=request.batch_id)
        if not 0 < request.timeout_ms <= MAX_TIMEOUT * 1000:
            late = Refused(Reason.DEADLINE_REQUIRED, "a batch needs timeout_ms, of at most an hour")
            facts = told_to_guest(late, call.correlation)
            response.failures.extend(facts.failure(operation.request_id[:ID_SIZE]) for operation in request.operations)
            await self._late(len(request.operations))
            return response
        outcome = await self._operations.perform(
            call,
            request.operations,
            timeout=request.timeout_ms / 1000,
            batch=request.batch_id,
            untrusted_origins=request.origins,
        )
        response.results.extend(outcome.results)
        await self._late(sum(isinstance(failure.error, Refused) for failure in outcome.failures))
        response.failures.extend(
            told_to_guest(failure.error, failure.correlation).failure(failure.request_id)
            for failure in outcome.failures
        )
        return response

    async def _late(self, refused: int) -> None:
        """Many refusals are answered late; see ``refusals.RefusalPace``."""
        if refused:
            await asyncio.sleep(self._guest.refused_operations.delay(refused))

    def _require_current(self, call: Call) -> None:
        """For what runs on under a certificate that the guard saw long ago."""
        try:
            if call.certificate is None:
                raise Refused(Reason.CERTIFICATE_REQUIRED, "this call needs a certificate")
            self._guest.require_current(call.certificate)
        except Refused as error:
            self._note(call, error)
            raise

    def _note(self, call: Call, error: SecFuNetError) -> None:
        """On record, with the cause that the guest is not told; within the bound of this domain's refusals."""
        note = self._guest.refusals.admit()
        if note is None:
            return
        facts = facts_of(error)
        with contextlib.suppress(MiddlewareError):
            self._audit.record(
                DomainRecord(
                    Action.CALL,
                    "refused" if isinstance(error, Refused) else "failed",
                    correlation=call.correlation,
                    guest_correlation=call.guest_correlation,
                    vm=self._guest.uuid,
                    name=self._guest.record.name,
                    operation=call.method.rpartition("/")[2],
                    reason=facts.reason,
                    domain=facts.domain,
                    detail="; ".join(part for part in (cause_of(error), note) if part),
                )
            )


class _Pipeline:
    """Batches of one stream, several at a time; answers in the order in which they are ready.

    A batch is read only when one of the places is free, and its place is free again when its answer was taken: a caller that does not
    read its answers is not read either.
    """

    def __init__(self, perform: Callable[[pb.OperateRequest], Awaitable[pb.OperateResponse]]) -> None:
        self._perform = perform
        self._places = asyncio.Semaphore(BATCHES_IN_FLIGHT)
        self._answers: asyncio.Queue[pb.OperateResponse | Exception | None] = asyncio.Queue()
        self._batches: set[asyncio.Task[None]] = set()

    async def run(self, requests: AsyncIterator[pb.OperateRequest]) -> AsyncGenerator[pb.OperateResponse, None]:
        reader = asyncio.create_task(self._read(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                self._places.release()
        finally:
            for task in (reader, *self._batches):
                task.cancel()
            await asyncio.gather(reader, *self._batches, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.OperateRequest]) -> None:
        try:
            async for request in requests:
                await self._places.acquire()
                task = asyncio.create_task(self._answer(request))
                self._batches.add(task)
                task.add_done_callback(self._batches.discard)
            while self._batches:
                await asyncio.wait(set(self._batches))
        except Exception as error:  # noqa: BLE001 - it goes to whoever runs the stream
            self._answers.put_nowait(error)
        else:
            self._answers.put_nowait(None)

    async def _answer(self, request: pb.OperateRequest) -> None:
        try:
            self._answers.put_nowait(await self._perform(request))
        except Exception as error:  # noqa: BLE001 - it goes to whoever runs the stream
            self._answers.put_nowait(error)
