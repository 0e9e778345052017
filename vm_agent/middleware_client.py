"""The agent's way to the Secure Middleware: gRPC with mutual TLS over the domain's channel.

``MiddlewareConnection`` is one channel with one certificate. ``MiddlewareClient`` keeps one connection, watches the identity over it,
renews the certificate at two thirds of its life (a renewed certificate means a new channel; the old one answers what it was asked, then
closes), also after its end, and opens the streams that operations travel over. What waits for an answer is not here: it outlives a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from secfunet.rpc.correlation import CORRELATION_KEY, new_correlation
from secfunet.rpc.facts import from_error
from secfunet.rpc.reasons import Domain, Reason
from vm_agent.enrolment import Enrolment, certificate_ended, channel_options, renew_ended
from vm_agent.errors import (
    UNREACHABLE,
    AgentError,
    EnrolmentRefusedError,
    IdentityUnusableError,
    OperationFailedError,
    UnavailableError,
    from_rpc_error,
    sent_again,
)
from vm_agent.identity import VmIdentity, parse_identity
from vm_agent.options import AgentOptions
from vm_agent.results import ResultChecker

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall

log = logging.getLogger(__name__)

CALL_TIMEOUT = 10.0  # seconds, for calls that no local program waits for
DOUBT_TIME = 10.0  # seconds without dom0 after which the certificate may have ended there: it is renewed as if it had
DRAIN_TIME = 60.0  # seconds that a replaced channel may still answer
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between attempts to reach the middleware

Operation = operation_pb2.Operation


_UNKNOWN_ORIGIN = agent_pb2.Origin()


class OperateStream:
    """One Operate stream; see ``batching.BatchStream``."""

    def __init__(
        self,
        call: StreamStreamCall[agent_pb2.OperateRequest, agent_pb2.OperateResponse],
        origins: Mapping[bytes, agent_pb2.Origin] = MappingProxyType({}),
    ) -> None:
        """``origins``: by request id; what is missing there is sent without one."""
        self._call = call
        self._origins = origins

    async def send(self, batch_id: int, requests: Sequence[Operation], timeout: float) -> None:
        message = agent_pb2.OperateRequest(
            batch_id=batch_id,
            operations=requests,
            timeout_ms=min(int(timeout * 1000) + 1, 2**32 - 1),
            origins=[self._origins.get(one.request_id, _UNKNOWN_ORIGIN) for one in requests],
        )
        with self._errors():
            await self._call.write(message)

    async def receive(self) -> tuple[int, agent_pb2.OperateResponse]:
        with self._errors():
            response = await self._call.read()
        if not isinstance(response, agent_pb2.OperateResponse):  # grpc.aio.EOF
            raise UnavailableError("the Secure Middleware ended the stream")
        return response.batch_id, response

    async def finish(self) -> None:
        with self._errors():
            await self._call.done_writing()

    def abort(self) -> None:
        self._call.cancel()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """grpc.aio's ways to say that a call is over, as our errors; a cancellation of the calling task stays one."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise sent_again(from_rpc_error(error)) from error
        except asyncio.InvalidStateError as error:
            raise UnavailableError("the stream to the Secure Middleware is over") from error
        except asyncio.CancelledError:
            if _given_up(self._call):
                raise UnavailableError("the stream to the Secure Middleware was given up") from None
            raise


def _given_up(call: grpc.aio.Call) -> bool:
    """Whether a CancelledError comes from a call that we cancelled, and not from a cancellation of the task that waits for it."""
    task = asyncio.current_task()
    return call.cancelled() and (task is None or not task.cancelling())


class MiddlewareConnection:
    """One channel to the middleware, opened with one certificate. Connects at the first call."""

    def __init__(self, enrolment: Enrolment, target: str) -> None:
        self.enrolment = enrolment
        self._channel = grpc.aio.secure_channel(
            target, enrolment.credentials(), channel_options(enrolment.server_name, target)
        )
        self._stub = agent_pb2_grpc.AgentServiceStub(self._channel)
        self._watching: grpc.aio.Call | None = None

    async def renew(self, now: float) -> Enrolment:
        """The enrolment with a fresh certificate for the same key. Raises EnrolmentRefusedError or another AgentError."""
        request = agent_pb2.RenewCertificateRequest(certificate_signing_request=self.enrolment.key.signing_request())
        try:
            response = await self._stub.RenewCertificate(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return self.enrolment.renewed(response.certificate, now)

    async def refusal(self) -> AgentError | None:
        """Why the middleware cannot tell the whole identity; None if it can now."""
        try:
            await self._stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        return None

    async def probe(self, timeout: float) -> int:
        """The grid's clock, UTC seconds, asked along the whole chain. Raises the AgentError that an operation would meet."""
        try:
            response = await self._stub.Probe(agent_pb2.ProbeRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            facts = from_error(error, Domain.MIDDLEWARE, Domain.GRID)
            raise (from_rpc_error(error) if facts is None else OperationFailedError(facts)) from error
        return int(response.time)

    async def watch_identity(self) -> AsyncIterator[agent_pb2.Identity]:
        """The identity now, and again whenever it changes, until the stream is lost (an AgentError) or ended by the middleware."""
        call = self._stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
        self._watching = call
        try:
            async for response in call:
                yield response.identity
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            if not _given_up(call):
                raise
        finally:
            call.cancel()

    def stop_watching(self) -> None:
        """Ends ``watch_identity``."""
        if self._watching is not None:
            self._watching.cancel()

    def operate(self, origins: Mapping[bytes, agent_pb2.Origin]) -> OperateStream:
        """A new stream for batches."""
        return OperateStream(self._stub.Operate(metadata=((CORRELATION_KEY, new_correlation()),)), origins)

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel; calls under way have ``grace`` seconds."""
        await self._channel.close(grace)


class MiddlewareClient:
    """The agent as a client of the middleware, for one enrolment and its renewals; an async context manager.

    ``target``: what ``enrolment.agent`` is for gRPC, ``enrol_target`` what ``enrolment.enrol`` is ("": there is none). ``save`` keeps each
    renewed enrolment, ``renewed`` is told of it: streams are to be opened anew.
    ``problem``: None, or why operations would fail now.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        options: AgentOptions,
        *,
        target: str,
        enrol_target: str,
        save: Callable[[Enrolment], None],
        renewed: Callable[[], None],
        identity: VmIdentity | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._save = save
        self._renewed = renewed
        self._clock = clock
        self._target = target
        self._enrol_target = enrol_target
        self._connection = MiddlewareConnection(enrolment, target)
        self._checker = ResultChecker(
            options.container_profile, clock=clock, max_age=options.limits.answer_age, identity=identity
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._connected = asyncio.Event()
        self._ended = asyncio.Event()
        self._replaced = asyncio.Event()  # set when there is a new connection
        self._doubtful = (
            asyncio.Event()
        )  # set when the certificate may have ended in dom0, whatever the clock here says
        self._not_before = 0.0  # UTC seconds: no renewal earlier
        self._away_since: float | None = None  # monotonic
        self.first_word = asyncio.Event()  # set when the middleware told an identity, or could not be reached
        self.changed = asyncio.Event()  # set whenever ``connected`` may have changed
        self.problem: AgentError | None = UnavailableError("the Secure Middleware has not been reached yet")

    @property
    def enrolment(self) -> Enrolment:
        return self._connection.enrolment

    @property
    def identity(self) -> VmIdentity | None:
        """Who the VM is, as last heard."""
        return self._checker.identity

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def checker(self) -> ResultChecker:
        return self._checker

    async def __aenter__(self) -> MiddlewareClient:
        self._tasks = [
            asyncio.create_task(self._watch(), name="vm-agent-identity"),
            asyncio.create_task(self._renew(), name="vm-agent-renewal"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lost()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._connection.close()

    async def probe(self, timeout: float) -> int:
        """See MiddlewareConnection.probe."""
        return await self._connection.probe(timeout)

    async def ended(self) -> None:
        """Returns when the certificate has ended and dom0 does not renew it: only new join information helps then."""
        await self._ended.wait()

    async def open_stream(self, origins: Mapping[bytes, agent_pb2.Origin] = MappingProxyType({})) -> OperateStream:
        """A stream for operations, whose ``origins`` are known by their request ids. Raises UnavailableError (ask again),
        IdentityUnusableError or OperationFailedError.
        """
        if self._checker.identity is None:
            if isinstance(self.problem, IdentityUnusableError | OperationFailedError):
                raise sent_again(self.problem)
            try:
                async with asyncio.timeout(LONGEST_PAUSE):
                    await self._connected.wait()
            except TimeoutError:
                raise UnavailableError(str(self.problem or "this VM's identity is not known yet")) from None
        return self._connection.operate(origins)

    async def _watch(self) -> None:
        """Keeps the identity fresh; tells by the way whether the middleware is there."""
        pause = FIRST_PAUSE
        while True:
            connection = self._connection
            try:
                async for untrusted in connection.watch_identity():
                    pause = FIRST_PAUSE
                    self._heard(untrusted)
                    await self._ask_why(connection)
                problem: AgentError = UnavailableError("the Secure Middleware ended the connection")
            except AgentError as error:
                problem = error
            if connection is not self._connection:
                continue  # it was replaced: watch the new one at once
            self._lost()
            self._doubt(problem)
            if not isinstance(self.problem, type(problem)):
                facts = {"reason": problem.reason, "detail": problem.detail}
                log.warning("the Secure Middleware is away: %s", problem, extra=facts)
            self.problem = problem
            self.first_word.set()
            self._replaced.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._replaced.wait()
            pause = min(pause * 2, LONGEST_PAUSE)

    def _doubt(self, problem: AgentError) -> None:
        """A certificate that ended by dom0's clock is not let in, and TLS does not say why."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        unexplained = str(problem) == UNREACHABLE and now - self._away_since >= DOUBT_TIME
        if problem.reason == Reason.CERTIFICATE_EXPIRED or unexplained:
            self._away_since = now
            self._doubtful.set()

    def _heard(self, untrusted: agent_pb2.Identity) -> None:
        try:
            identity = parse_identity(untrusted)
        except IdentityUnusableError as error:
            log.error("the identity cannot be used: %s", error, extra={"reason": error.reason})
            self.problem = error
            self.first_word.set()
            self._lost()
            return
        if identity != self._checker.identity:
            log.info("identity", extra={"vmid": identity.vmid, "hvid": identity.hvid})
        self._checker.identity = identity
        self.problem = None
        self._away_since = None
        self._doubtful.clear()
        self.first_word.set()
        self._connected.set()
        self.changed.set()

    async def _ask_why(self, connection: MiddlewareConnection) -> None:
        """An identity that misses what only the grid can fill has a cause, and it is the cause that a person needs to know."""
        if not isinstance(self.problem, IdentityUnusableError):
            return
        refusal = await connection.refusal()
        if refusal is not None:
            log.error("this VM's key cannot be used: %s", refusal, extra={"reason": refusal.reason})
            self.problem = refusal

    def _lost(self) -> None:
        self._connected.clear()
        self.changed.set()

    async def _renew(self) -> None:
        """Renews the certificate at two thirds of its life, and tries again, also after its end, until dom0 says that it is over."""
        pause, told = FIRST_PAUSE, ""
        while True:
            now = self._clock()
            has_ended = now >= self.enrolment.expires_at
            renew_at = max(self.enrolment.renew_at, self._not_before)
            if now < renew_at and not self._doubtful.is_set():
                # In short steps: the wall clock may be set, and a suspended VM does not count its sleep.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(renew_at - now, 30.0)):
                        await self._doubtful.wait()
                continue
            try:
                if has_ended or self._doubtful.is_set():
                    self._doubtful.clear()
                    self._replace(await self._renew_ended(now))
                else:
                    self._replace(await self._connection.renew(now))
                pause, told = FIRST_PAUSE, ""
            except AgentError as error:
                if isinstance(error, EnrolmentRefusedError) and has_ended:
                    self._end(error)
                    return
                if str(error) != told:
                    told = str(error)
                    facts = {"reason": error.reason, "detail": error.detail}
                    log.warning("the certificate was not renewed: %s", error, extra=facts)
                rest = self.enrolment.expires_at - self._clock()
                await asyncio.sleep(min(pause, rest) if rest > 0 else min(pause, LONGEST_PAUSE))
                pause = min(pause * 2, 30.0)

    async def _renew_ended(self, now: float) -> Enrolment:
        if not self._enrol_target:
            raise EnrolmentRefusedError(
                "what is kept of the enrolment does not say where to renew an ended certificate"
            )
        return await renew_ended(self.enrolment, target=self._enrol_target, now=now, timeout=CALL_TIMEOUT)

    def _end(self, error: AgentError) -> None:
        self.problem = certificate_ended(error)
        log.error("%s", self.problem, extra={"reason": self.problem.reason})
        self._lost()
        self._ended.set()

    def _replace(self, enrolment: Enrolment) -> None:
        self._save(enrolment)
        # Certificates are dated back, for clocks that are behind: one that lives shortly would be due as soon as it is there.
        now = self._clock()
        self._not_before = now + (enrolment.expires_at - now) / 2
        old, self._connection = self._connection, MiddlewareConnection(enrolment, self._target)
        log.info("certificate renewed", extra={"expires_at": enrolment.expires_at})
        self._renewed()
        self._replaced.set()
        old.stop_watching()
        task = asyncio.create_task(old.close(DRAIN_TIME), name="vm-agent-drain")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
