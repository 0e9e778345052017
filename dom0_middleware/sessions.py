"""A session with the grid for each VM: opened once, when it is first needed, and ended at once when the VM loses its right to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from dom0_middleware.errors import Refused, Unavailable
from dom0_middleware.state import VmRecord
from dom0_middleware.vm_definition import clock_of_token
from gose_client.errors import GridRefusedError
from gose_client.trial import Link
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from secfunet.rpc.reasons import Reason
from secfunet.service.flood_log import FloodLog

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
_GRACE = 0.1  # seconds
CLOSE_TIMEOUT = 5.0  # seconds that the grid gets to hear of it
# Seconds for which the grid's refusal of a login stands: a guest that asks in a loop must not keep the hypervisor's only card busy.
REFUSAL_STANDS = 0.5


class BatchAnswer(Protocol):
    @property
    def containers(self) -> tuple[bytes, ...]: ...
    @property
    def failures(self) -> tuple[operation_pb2.OperationFailure, ...]: ...


class GridSession(Protocol):
    """What of ``gose_client.VmSession`` is used here."""

    @property
    def operations(self) -> frozenset[str]: ...
    @property
    def container_authority(self) -> bytes: ...
    async def execute(
        self, operations: Sequence[operation_pb2.Operation], *, timeout: float, correlation: str = ""
    ) -> BatchAnswer: ...
    async def probe(self, *, timeout: float) -> int: ...
    async def close(self) -> None: ...


class Grid(Protocol):
    """What of ``gose_client.GoseClient`` is used here."""

    async def open_session(
        self, vm_certificate: bytes, vm_auth_token: str, *, timeout: float, correlation: str = ""
    ) -> GridSession: ...
    async def content_key(self, container: bytes, *, timeout: float) -> bytes: ...
    async def look(self, *, timeout: float) -> Sequence[Link]: ...
    async def card_lives(self, *, timeout: float) -> None: ...


class _Slot:
    """What one VM has with the grid. Once ``ended`` it stays so; a later run of the domain gets a slot of its own."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.session: GridSession | None = None
        self.refusal: GridRefusedError | None = None
        self.refused_at = 0.0  # of the event loop's clock
        self.ended = False
        self.tasks: set[asyncio.Task[Any]] = set()


class VmSessions:
    """Sessions by the domain's UUID."""

    def __init__(self, grid: Grid, *, clock: Callable[[], float] = time.time) -> None:
        self._grid = grid
        self._clock = clock
        self._flood_log = FloodLog(log)
        self._slots: dict[str, _Slot] = {}
        # Slots of an earlier token, whose last calls are not over: what ends a VM's right ends them, too.
        self._retiring: dict[str, set[_Slot]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(slot.session is not None for slot in self._slots.values())

    def current(self, uuid: str) -> GridSession | None:
        """The session if there is one; never asks the grid."""
        slot = self._slots.get(uuid)
        return slot.session if slot is not None else None

    async def session(self, vm: VmRecord, *, timeout: float, correlation: str = "") -> GridSession:
        """The VM's session, opened if need be. Callers that come together share one login.

        Raises what GoseClient.open_session raises; Refused (SESSION_ENDED) if the VM lost its right meanwhile; Unavailable
        (DEADLINE_EXCEEDED) after ``timeout`` seconds.
        """
        slot = self._slots.setdefault(vm.uuid, _Slot())
        if slot.session is not None:
            return slot.session
        return await self._until_ended(slot, self._open(slot, vm, timeout, correlation))

    async def execute(
        self,
        vm: VmRecord,
        operations: Sequence[operation_pb2.Operation],
        *,
        timeout: float,
        correlation: str = "",
    ) -> tuple[list[agent_pb2.SealedResults], list[operation_pb2.OperationFailure]]:
        """Runs a batch; containers come back closed, each beside the key to it. Raises as ``session`` does."""
        slot = self._slots.setdefault(vm.uuid, _Slot())
        return await self._until_ended(slot, self._execute(slot, vm, operations, timeout, correlation))

    async def probe(self, vm: VmRecord, *, timeout: float, correlation: str = "") -> int:
        """Signs of life of the hypervisor's card, the grid and the VM's card; the grid's clock, UTC seconds. Raises as ``session`` does."""
        slot = self._slots.setdefault(vm.uuid, _Slot())
        return await self._until_ended(slot, self._probe(slot, vm, timeout, correlation))

    async def _probe(self, slot: _Slot, vm: VmRecord, timeout: float, correlation: str) -> int:
        async with _deadline(timeout):
            session = slot.session or await self._open(slot, vm, timeout, correlation)
            await self._grid.card_lives(timeout=timeout)
            return await session.probe(timeout=timeout)

    def end(self, uuid: str) -> None:
        """At once: what is in flight for this VM fails, its session is used no more. The grid is told in the background."""
        slots = set(self._retiring.get(uuid, ()))
        if (present := self._slots.pop(uuid, None)) is not None:
            slots.add(present)
        for slot in slots:
            slot.ended = True
            for task in slot.tasks:
                task.cancel()
            if slot.session is not None:
                self._close_later(slot.session)
                slot.session = None

    def renew(self, uuid: str) -> None:
        """The VM got another token: what is in flight ends as it may, what comes next gets a session of its own."""
        slot = self._slots.pop(uuid, None)
        if slot is not None:
            self._retiring.setdefault(uuid, set()).add(slot)
            task = asyncio.ensure_future(self._retire(uuid, slot))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def told(self) -> None:
        """Returns when the grid was told of the sessions that ended until now, or did not hear of it within CLOSE_TIMEOUT."""
        if self._closing:
            await asyncio.wait(set(self._closing), timeout=CLOSE_TIMEOUT)

    async def close(self) -> None:
        """Ends every session and waits until the grid was told."""
        for uuid in {*self._slots, *self._retiring}:
            self.end(uuid)
        while self._closing:
            await asyncio.wait(set(self._closing))

    async def _open(self, slot: _Slot, vm: VmRecord, timeout: float, correlation: str) -> GridSession:
        async with _deadline(timeout), slot.lock:
            if slot.ended:
                raise _ended()
            if slot.session is None:
                now = asyncio.get_running_loop().time
                if slot.refusal is not None and now() < slot.refused_at + REFUSAL_STANDS:
                    raise slot.refusal.with_traceback(None)
                try:
                    session = await self._grid.open_session(
                        vm.vm_certificate, vm.vm_auth_token, timeout=timeout, correlation=correlation
                    )
                except GridRefusedError as error:
                    slot.refusal, slot.refused_at = error, now()
                    self._explain(vm, error)
                    raise
                if slot.ended:
                    # The right ended while the grid was asked, and the cancellation was not heard.
                    self._close_later(session)
                    raise _ended()
                slot.session = session
            return slot.session

    def _explain(self, vm: VmRecord, error: GridRefusedError) -> None:
        """The grid does not say why it refuses a token; a clock that differs can be seen from here, too."""
        if error.reason == Reason.TOKEN_REFUSED:
            hint = clock_of_token(vm, self._clock()) or "the grid's log says why"
            self._flood_log.warning(
                f"{error.reason} {vm.uuid}", "the grid refused a VM-Auth-Token", {"vm": vm.uuid, "cause": hint}
            )

    async def _execute(
        self,
        slot: _Slot,
        vm: VmRecord,
        operations: Sequence[operation_pb2.Operation],
        timeout: float,
        correlation: str,
    ) -> tuple[list[agent_pb2.SealedResults], list[operation_pb2.OperationFailure]]:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        async with _deadline(timeout):
            session = slot.session or await self._open(slot, vm, timeout, correlation)
            if slot.ended:
                raise _ended()
            answer = await session.execute(operations, timeout=max(0.001, end - loop.time()), correlation=correlation)
            if len(answer.containers) > len(operations):
                # Each would keep the hypervisor's card busy.
                raise Unavailable(
                    Reason.GRID_UNAVAILABLE, "the grid gave more containers than it was asked for results"
                )
            results = [
                agent_pb2.SealedResults(
                    container=container,
                    content_key=await self._grid.content_key(container, timeout=max(0.001, end - loop.time())),
                )
                for container in answer.containers
            ]
        if slot.ended:
            raise _ended()
        return results, list(answer.failures)

    async def _until_ended(self, slot: _Slot, work: Coroutine[Any, Any, Answer]) -> Answer:
        task = asyncio.ensure_future(work)
        slot.tasks.add(task)
        task.add_done_callback(slot.tasks.discard)
        try:
            answer = await task
            if slot.ended:
                # The end came in the same turn of the loop as the answer.
                raise _ended()
            return answer
        except asyncio.CancelledError:
            if slot.ended and not _cancelling():
                raise _ended() from None
            task.cancel()
            raise

    def _close_later(self, session: GridSession) -> None:
        task = asyncio.ensure_future(_close(session))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _retire(self, uuid: str, slot: _Slot) -> None:
        try:
            if slot.tasks:
                await asyncio.wait(set(slot.tasks))
        finally:
            retiring = self._retiring.get(uuid, set())
            retiring.discard(slot)
            if not retiring:
                self._retiring.pop(uuid, None)
        session, slot.session = slot.session, None
        if session is not None:
            await _close(session)


async def _close(session: GridSession) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await session.close()
    except Exception as error:  # noqa: BLE001 - whatever it is: here the session is gone, and there it runs out
        log.warning("the grid was not told that a session ended: %s", error)


@contextlib.asynccontextmanager
async def _deadline(timeout: float) -> AsyncIterator[None]:
    try:
        # The client of the grid keeps the deadline itself, and knows better what the time was spent on: this is for what it does not see.
        async with asyncio.timeout(timeout + _GRACE):
            yield
    except TimeoutError:
        raise Unavailable(Reason.DEADLINE_EXCEEDED, "the grid did not answer in time") from None


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _ended() -> Refused:
    return Refused(Reason.SESSION_ENDED, "this VM lost its session with the grid")
