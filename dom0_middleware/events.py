"""What happens to VMs, told to every orchestrator that watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from dom0_middleware.errors import Reason, Unavailable
from secfunet.middleware.v1 import orchestrator_pb2 as pb

MAX_WAITING = 256  # events that a watcher may lag behind


class EventHub:
    """``clock``: UTC seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queues: set[asyncio.Queue[pb.WatchEventsResponse | None]] = set()

    def tell(self, kind: pb.VmEventKind, vm: pb.Vm) -> None:
        event = pb.WatchEventsResponse(kind=kind, vm=vm, time=int(self._clock()))
        for queue in list(self._queues):
            if queue.qsize() < MAX_WAITING:
                queue.put_nowait(event)
            else:
                # It would have gaps and not know: it is sent away instead.
                self._queues.discard(queue)
                queue.put_nowait(None)

    async def watch(self) -> AsyncGenerator[pb.WatchEventsResponse, None]:
        """Every event from the first step on. Raises Unavailable (WATCHER_TOO_SLOW) to one that lags behind."""
        queue: asyncio.Queue[pb.WatchEventsResponse | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
            raise Unavailable(Reason.WATCHER_TOO_SLOW, "events came faster than they were read; list the VMs again")
        finally:
            self._queues.discard(queue)
