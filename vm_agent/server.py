"""The daemon, put together: enrols, stays enrolled, and serves the programs of this VM.

What programs wait for is in the agent's one queue (``batching``), which outlives every certificate and connection: a new enrolment, in
this dom0 or in another one, is handed what waits.
The local socket is there from the beginning, also while dom0 is not: a program then gets a sentence that says what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped] # no stubs are installed
from grpc_health.v1.health import aio as health  # type: ignore[import-untyped] # as above

from secfunet import __version__
from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from secfunet.operation import OperationError, check_key
from secfunet.service.files import open_private, private_folder
from secfunet.service.unix_socket import SocketPathError, unix_target
from vm_agent.batching import Batcher, Ticket
from vm_agent.enrolment import Enrolment, EnrolmentStore, certificate_ended, enrol, renew_ended
from vm_agent.errors import AgentError, EnrolmentRefusedError, NotEnrolledError, RequestError, UnavailableError
from vm_agent.identity import VmIdentity
from vm_agent.join import JoinInformation
from vm_agent.join_source import join_source
from vm_agent.local_api import LocalApi
from vm_agent.local_socket import DoorError, LocalDoor
from vm_agent.middleware_client import MiddlewareClient, OperateStream
from vm_agent.options import AgentOptions
from vm_agent.origin import current_origin
from vm_agent.probe import TIMEOUT as PROBE_TIMEOUT
from vm_agent.probe import Probe
from vm_agent.transport import Transport

log = logging.getLogger(__name__)

ENROL_TIMEOUT = 60.0  # seconds: what is given up is asked for again, but that is bounded at the other end
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between looks at the join information, and between attempts to enrol
SETTLE_TIME = 10.0  # seconds that a program waits for the first enrolment
INVITED_PAUSE = 1.0  # seconds between looks for a new invitation of an enrolled agent
STOP_GRACE = 2.0  # seconds that local calls may still take after SIGTERM
# What one program can make the agent hold is small: what it sends is an operation (512 bytes and what is around them), and what it has
# opened and not sent costs memory, too.
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_metadata_size", 4096),
    ("grpc.absolute_max_metadata_size", 8192),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8192),
    ("grpc.so_reuseport", 0),
)
SERVICE = local_pb2.DESCRIPTOR.services_by_name["LocalService"].full_name


Found = tuple[Enrolment, VmIdentity | None]
"""An enrolment, and who the VM is if dom0 said so with it."""


class AgentService:
    """``async with AgentService(options)`` is a running agent; see ``local_api.AgentCore`` for what it offers to its API."""

    def __init__(self, options: AgentOptions, *, clock: Callable[[], float] = time.time) -> None:
        self._options = options
        self._clock = clock
        self._store = EnrolmentStore(options.state)
        self._join = join_source(options.join, options.state)
        self._transport = Transport(options.state)
        self._stack = AsyncExitStack()
        self._client: MiddlewareClient | None = None
        self._serving = asyncio.Event()  # set while ``_client`` can be asked for streams
        self._batcher: Batcher[operation_pb2.Operation, agent_pb2.OperateResponse] | None = None
        self._problem: AgentError = NotEnrolledError("the agent has not enrolled yet")
        self._is_enrolling = False
        self._probe = Probe(
            lambda: self._client,
            lambda: self._problem,
            max_age=options.limits.answer_age,
            clock=clock,
        )
        self._kept = ""  # digest of the join information that the kept enrolment came from
        self._refused: tuple[str, AgentError] | None = None  # digest of join information that will never do, and why
        self._not_renewed: tuple[str, AgentError] | None = (
            None  # the same, of an enrolment whose certificate is not renewed any more
        )
        self._health = health.HealthServicer()
        self._door: LocalDoor | None = None
        self._settled = asyncio.Event()
        self._origins: dict[bytes, agent_pb2.Origin] = {}  # of operations that wait, by their request ids

    async def __aenter__(self) -> AgentService:
        async with AsyncExitStack() as stack:
            folder = private_folder(self._options.state)
            stack.callback(os.close, lock_folder(folder))
            inner = folder / "s"
            server = grpc.aio.server(options=SERVER_OPTIONS)
            api = LocalApi(self, self._options.limits, who=lambda peer: self._door.caller(peer) if self._door else None)
            local_pb2_grpc.add_LocalServiceServicer_to_server(api, server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            await self._tell_health(False)
            try:
                unix_target(self._options.socket)  # its clients use it, too
                server.add_insecure_port(unix_target(inner))
            except SocketPathError as error:
                raise DoorError(str(error)) from None
            except RuntimeError:
                raise DoorError(f"{inner} cannot be listened at: is the path of the state folder too long?") from None
            await server.start()
            stack.push_async_callback(server.stop, None)  # where what comes below cannot be made
            # Left in the opposite order: no new callers, then those inside get their answers, then the way to dom0 is closed.
            await stack.enter_async_context(self._transport)
            limits = self._options.limits
            self._batcher = Batcher(
                self._open_stream,
                self._settle,
                max_batch=limits.batch,
                max_in_flight=limits.batches_in_flight,
                max_waiting=limits.waiting,
            )
            stack.push_async_callback(self._batcher.close)
            life = asyncio.create_task(self._live(), name="vm-agent-life")
            stack.push_async_callback(_cancelled, life)
            self._door = await stack.enter_async_context(LocalDoor(self._options, inner))
            stack.push_async_callback(server.stop, STOP_GRACE)
            stack.callback(self._door.stop_listening)
            if self._options.metrics_port is not None:
                self._serve_metrics(self._options.metrics_port, stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def identity(self) -> VmIdentity:
        """Who this VM is. Raises the AgentError that keeps it from being known."""
        if self._client is None:
            raise self._problem
        identity = self._client.identity
        if identity is None:
            raise self._client.problem or self._problem
        return identity

    def status(self) -> local_pb2.GetStatusResponse:
        """How the agent is."""
        client = self._client
        if client is None:
            return local_pb2.GetStatusResponse(version=__version__, problem=str(self._problem))
        return local_pb2.GetStatusResponse(
            version=__version__,
            enrolled=client.enrolment.expires_at > self._clock(),
            connected=client.connected,
            certificate_expires_at=int(client.enrolment.expires_at),
            problem=str(client.problem) if client.problem is not None else "",
            transport=self._transport.name,
        )

    async def probed(self, timeout: float) -> local_pb2.GetStatusResponse:
        """The same, and whether an operation would work now."""
        found = self.status()
        broken = await self._probe.broken_link(min(timeout * 0.9, PROBE_TIMEOUT))
        found.works = broken is None
        if broken is not None:
            found.broken_link, found.reason, found.problem = broken.link, broken.reason, broken.message
        return found

    async def operate(self, operation: operation_pb2.Operation, *, timeout: float) -> bytes:
        """The output of one operation, out of a container that was verified. ``request_id`` is given here, and stays.

        Raises NotEnrolledError while there is no certificate, RequestError if the operation does not fit the VM's key; AnswerRefusedError,
        OperationFailedError, DeadlineError, OverloadedError, UnavailableError or IdentityUnusableError.
        """
        begin = time.monotonic()
        client = self._client
        if client is None:
            await self.settled(timeout)
            client = self._client
        if client is None:
            raise self._problem
        if client.identity is not None:
            try:
                check_key(operation, client.identity.vm_key)
            except OperationError as error:
                raise RequestError(str(error)) from error
        if self._batcher is None:
            raise self._problem
        operation.request_id = os.urandom(16)
        origin = current_origin.get(None)
        if origin is not None:
            self._origins[operation.request_id] = origin.message()
        try:
            output = await self._batcher.submit(
                Ticket(operation.request_id, operation), timeout=timeout - (time.monotonic() - begin)
            )
        finally:
            self._origins.pop(operation.request_id, None)
        if not isinstance(output, bytes):
            raise TypeError("an output is bytes")
        return output

    async def _open_stream(self) -> OperateStream:
        """Of the present client; the next one is waited for, as long as the batcher waits for a stream."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_PAUSE):
                await self._serving.wait()
        client = self._client
        if client is None or not self._serving.is_set():
            raise UnavailableError(str(self._problem))
        return await client.open_stream(self._origins)

    def _settle(
        self, tickets: Sequence[Ticket[operation_pb2.Operation]], untrusted: agent_pb2.OperateResponse
    ) -> dict[bytes, object | AgentError]:
        if self._client is None:
            waits = UnavailableError(str(self._problem))
            return {ticket.request_id: waits for ticket in tickets}
        return self._client.checker.settle(tickets, untrusted)

    async def settled(self, timeout: float) -> None:
        """Returns when it is known whether this agent is enrolled and who the VM is, or after ``timeout`` seconds.

        A program that starts together with the agent is not refused before the agent had its first chance.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout, SETTLE_TIME)):
                await self._settled.wait()
                if self._client is not None:
                    await self._client.first_word.wait()

    async def _live(self) -> None:
        """Enrols, serves until the certificate ends or dom0 hands over new join information, and so on."""
        pause = FIRST_PAUSE
        found: Found | None
        while True:
            try:
                found = await self._enrolled()
            except AgentError as error:
                if str(error) != str(self._problem):
                    log.warning("not enrolled: %s", error, extra={"reason": error.reason, "detail": error.detail})
                self._problem = error
                self._settled.set()
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            pause = FIRST_PAUSE
            while found is not None:
                found = await self._serve_enrolled(*found)

    async def _serve_enrolled(self, enrolment: Enrolment, identity: VmIdentity | None) -> Found | None:
        """Serves with it until it ends, or until a newer one is there, which is returned."""
        client = MiddlewareClient(
            enrolment,
            self._options,
            target=await self._transport.target(enrolment.agent),
            enrol_target=await self._transport.target(enrolment.enrol) if enrolment.enrol else "",
            save=self._save_renewed,
            renewed=self._streams_replaced,
            identity=identity,
            clock=self._clock,
        )
        async with client:
            self._client = client
            self._serving.set()
            self._streams_handed_over()
            self._settled.set()
            found: Found | None = None
            ended = asyncio.create_task(client.ended())
            again = asyncio.create_task(self._enrolled_again(enrolment))
            told = asyncio.create_task(self._follow(client))
            try:
                await asyncio.wait((ended, again), return_when=asyncio.FIRST_COMPLETED)
                if self._is_enrolling:
                    await asyncio.wait((again,), timeout=ENROL_TIMEOUT)  # its secret may be spent already
                found = again.result() if again.done() and not again.cancelled() else None
            finally:
                # What is asked meanwhile waits for the next client, if there is one already.
                self._serving.clear()
                self._streams_handed_over()
                if found is None:
                    self._problem = client.problem or self._problem
                    self._client = None
                for task in (ended, again, told):
                    task.cancel()
        await self._tell_health(False)
        return found

    def _streams_replaced(self) -> None:
        if self._batcher is not None:
            self._batcher.renew()

    def _streams_handed_over(self) -> None:
        if self._batcher is not None:
            self._batcher.hand_over()

    async def _follow(self, client: MiddlewareClient) -> None:
        while True:
            client.changed.clear()
            await self._tell_health(client.connected)
            await client.changed.wait()

    async def _enrolled_again(self, enrolment: Enrolment) -> Found:
        """Waits for join information that this enrolment did not come from, and enrols with it, beside what is served.

        What is served is not disturbed until that has worked: dom0 may be slow, or away again.
        """
        pause, problem = INVITED_PAUSE, ""
        while True:
            await asyncio.sleep(pause)
            try:
                join = await self._invitation()
                if join is not None and join.digest != enrolment.join_digest and not self._was_refused(join):
                    return await self._accept(join)
            except AgentError as error:
                if str(error) != problem:
                    problem = str(error)
                    log.warning("not enrolled again: %s", error, extra={"reason": error.reason, "detail": error.detail})
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                pause = INVITED_PAUSE

    def _save_renewed(self, renewed: Enrolment) -> None:
        """Not if a newer invitation of dom0 was taken meanwhile: the old one must not come back after a restart."""
        if renewed.join_digest == self._kept:
            self._save(renewed)

    def _save(self, enrolment: Enrolment) -> None:
        try:
            self._store.save(enrolment)
        except NotEnrolledError as error:
            log.error("this enrolment will end with this process: %s", error, extra={"reason": error.reason})

    async def _invitation(self) -> JoinInformation | None:
        """What dom0 hands over; else what it handed over and has erased by now, if that attempt is not over."""
        join = await asyncio.to_thread(self._join.read)
        if join is not None:
            return join
        begun = self._store.load_attempt()
        return begun.join if begun is not None else None

    async def _enrolled(self) -> Found:
        """The kept enrolment if it still serves, else a new one. Raises an AgentError that says what is missing."""
        kept: Enrolment | None = None
        problem: AgentError = NotEnrolledError(
            f"there is no join information at {self._join.where}: dom0 puts it there when it starts the domain"
        )
        try:
            kept = self._store.load()
        except NotEnrolledError as error:
            problem = error
        try:
            join = await self._invitation()
            if join is not None and self._refused is not None and self._was_refused(join):
                problem = self._refused[1]
            elif join is not None and (kept is None or join.digest != kept.join_digest):
                return await self._accept(join)
        except AgentError as error:
            problem = error
        if kept is None:
            raise problem
        self._kept = kept.join_digest
        if kept.expires_at <= self._clock():
            return await self._renewed_after_its_end(kept), None
        log.info("enrolled before", extra={"uuid": kept.uuid, "expires_at": kept.expires_at})
        return kept, None

    async def _renewed_after_its_end(self, kept: Enrolment) -> Enrolment:
        """Raises an AgentError; once dom0 has said that it does not renew it, NotEnrolledError without asking again."""
        if self._not_renewed is not None and self._not_renewed[0] == kept.join_digest:
            raise self._not_renewed[1]
        try:
            if not kept.enrol:
                raise EnrolmentRefusedError("what was kept does not say where")
            target = await self._transport.target(kept.enrol)
            renewed = await renew_ended(kept, target=target, now=self._clock(), timeout=ENROL_TIMEOUT)
        except EnrolmentRefusedError as error:
            ended = certificate_ended(error)
            self._not_renewed = kept.join_digest, ended
            raise ended from error
        self._save(renewed)
        log.info("the certificate had ended, and was renewed", extra={"expires_at": renewed.expires_at})
        return renewed

    async def _accept(self, join: JoinInformation) -> Found:
        self._is_enrolling = True
        try:
            target = await self._transport.target(join.enrol)
            attempt = self._store.begin_attempt(join)
            enrolment, identity = await enrol(attempt, target=target, now=self._clock(), timeout=ENROL_TIMEOUT)
        except EnrolmentRefusedError as error:
            self._store.forget_attempt()
            self._refused = join.digest, error  # attempts are bounded at the other end, and this one will never do
            raise
        finally:
            self._is_enrolling = False
        self._kept = enrolment.join_digest
        self._save(enrolment)
        self._store.forget_attempt()
        if not self._join.erase():
            log.warning("used join information could not be removed", extra={"path": self._join.where})
        log.info("enrolled", extra={"uuid": enrolment.uuid, "expires_at": enrolment.expires_at})
        return enrolment, identity

    def _was_refused(self, join: JoinInformation) -> bool:
        return self._refused is not None and self._refused[0] == join.digest

    async def _tell_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    def _serve_metrics(self, port: int, stack: AsyncExitStack) -> None:
        from vm_agent.metrics import Reading, serve_metrics

        def read() -> Reading:
            client = self._client
            counters = self._batcher.counters if self._batcher is not None else None
            return Reading(
                connected=client is not None and client.connected,
                certificate_expires_at=client.enrolment.expires_at if client is not None else 0.0,
                connections=self._door.connections if self._door is not None else 0,
                waiting=self._batcher.waiting if self._batcher is not None else 0,
                operations=counters.operations if counters is not None else 0,
                batches=counters.batches if counters is not None else 0,
                resent=counters.resent if counters is not None else 0,
                streams=counters.streams if counters is not None else 0,
                refused_answers=client.checker.refused if client is not None else 0,
            )

        stack.callback(serve_metrics(port, read).close)


def lock_folder(folder: Path) -> int:
    """Takes the state folder for this process; two agents would spend one join secret twice. Raises DoorError. Returns a descriptor."""
    descriptor = open_private(folder / "lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DoorError(f"another agent works in {folder}") from None
    return descriptor


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
