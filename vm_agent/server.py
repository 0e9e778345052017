"""The daemon, put together: enrols, stays enrolled, and serves the programs of this VM.

The local socket is there from the beginning, also while dom0 is not: a program then gets a sentence that says what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped] # no stubs are installed
from grpc_health.v1.health import aio as health  # type: ignore[import-untyped] # as above

from secfunet import __version__
from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.operation import OperationError, check_key
from secfunet.service.files import open_private, private_folder
from vm_agent.enrolment import Enrolment, EnrolmentStore, enrol
from vm_agent.errors import AgentError, EnrolmentRefusedError, NotEnrolledError, RequestError
from vm_agent.identity import VmIdentity
from vm_agent.join import JoinInformation
from vm_agent.join_source import join_source
from vm_agent.local_api import LocalApi
from vm_agent.local_socket import DoorError, LocalDoor
from vm_agent.middleware_client import MiddlewareClient
from vm_agent.options import AgentOptions
from vm_agent.transport import Transport

log = logging.getLogger(__name__)

ENROL_TIMEOUT = 60.0  # seconds: what is given up is asked for again, but that is bounded at the other end
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between looks at the join information, and between attempts to enrol
SETTLE_TIME = 10.0  # seconds that a program waits for the first enrolment
INVITED_PAUSE = 1.0  # seconds between looks for a new invitation of an enrolled agent
STOP_GRACE = 2.0  # seconds that local calls may still take after SIGTERM
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
        self._problem: AgentError = NotEnrolledError("the agent has not enrolled yet")
        self._is_enrolling = False
        self._kept = ""  # digest of the join information that the kept enrolment came from
        self._refused: tuple[str, AgentError] | None = None  # digest of join information that will never do, and why
        self._health = health.HealthServicer()
        self._door: LocalDoor | None = None
        self._settled = asyncio.Event()

    async def __aenter__(self) -> AgentService:
        async with AsyncExitStack() as stack:
            folder = private_folder(self._options.state)
            stack.callback(os.close, lock_folder(folder))
            inner = folder / "s"
            server = grpc.aio.server(
                options=[("grpc.max_receive_message_length", 65536), ("grpc.max_concurrent_streams", 1024)]
            )
            local_pb2_grpc.add_LocalServiceServicer_to_server(LocalApi(self, self._options.limits), server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            await self._tell_health(False)
            try:
                server.add_insecure_port(f"unix:{inner}")
            except RuntimeError:
                raise DoorError(f"{inner} cannot be listened at: is the path of the state folder too long?") from None
            await server.start()
            stack.push_async_callback(server.stop, None)  # where what comes below cannot be made
            # Left in the opposite order: no new callers, then those inside get their answers, then the way to dom0 is closed.
            await stack.enter_async_context(self._transport)
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
            enrolled=True,
            connected=client.connected,
            certificate_expires_at=int(client.enrolment.expires_at),
            problem=str(client.problem) if client.problem is not None else "",
            transport=self._transport.name,
        )

    async def operate(self, operation: operation_pb2.Operation, *, timeout: float) -> bytes:
        """One operation with the VM's key; see ``MiddlewareClient.operate``.

        Raises NotEnrolledError while there is no certificate, RequestError if the operation does not fit the VM's key.
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
        return await client.operate(operation, timeout=timeout - (time.monotonic() - begin))

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
            self._problem = NotEnrolledError(
                "the agent's certificate has ended: dom0 must hand this domain a new join secret (start the domain again)"
            )

    async def _serve_enrolled(self, enrolment: Enrolment, identity: VmIdentity | None) -> Found | None:
        """Serves with it until it ends, or until a newer one is there, which is returned."""
        client = MiddlewareClient(
            enrolment,
            self._options,
            target=await self._transport.target(enrolment.agent),
            save=self._save_renewed,
            identity=identity,
            clock=self._clock,
        )
        async with client:
            self._client = client
            self._settled.set()
            ended = asyncio.create_task(client.ended())
            again = asyncio.create_task(self._enrolled_again(enrolment))
            told = asyncio.create_task(self._follow(client))
            try:
                await asyncio.wait((ended, again), return_when=asyncio.FIRST_COMPLETED)
                if self._is_enrolling:
                    await asyncio.wait((again,), timeout=ENROL_TIMEOUT)  # its secret may be spent already
            finally:
                self._client = None
                for task in (ended, again, told):
                    task.cancel()
        await self._tell_health(False)
        return again.result() if again.done() and not again.cancelled() else None

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
        if kept is not None and kept.expires_at <= self._clock():
            problem = NotEnrolledError(
                "the agent's certificate has ended: dom0 must hand this domain a new join secret (start the domain again)"
            )
        try:
            join = await self._invitation()
            if join is not None and self._refused is not None and self._was_refused(join):
                problem = self._refused[1]
            elif join is not None and (kept is None or join.digest != kept.join_digest):
                return await self._accept(join)
        except AgentError as error:
            problem = error
        if kept is None or kept.expires_at <= self._clock():
            raise problem
        self._kept = kept.join_digest
        log.info("enrolled before", extra={"uuid": kept.uuid, "expires_at": kept.expires_at})
        return kept, None

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
            counters = client.batcher.counters if client is not None else None
            return Reading(
                connected=client is not None and client.connected,
                certificate_expires_at=client.enrolment.expires_at if client is not None else 0.0,
                connections=self._door.connections if self._door is not None else 0,
                waiting=client.batcher.waiting if client is not None else 0,
                operations=counters.operations if counters is not None else 0,
                batches=counters.batches if counters is not None else 0,
                resent=counters.resent if counters is not None else 0,
                streams=counters.streams if counters is not None else 0,
                refused_answers=client.checker.refused if client is not None else 0,
            )

        http, thread = serve_metrics(port, read)
        stack.callback(thread.join, 2.0)
        stack.callback(http.server_close)
        stack.callback(http.shutdown)


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
