"""Metrics for Prometheus over HTTP on the loopback interface: one thread, whoever connects and however often.

Any local user may connect. Connections are counted, bounded and timed from accept on (``doorkeeper``), and each gets one answer.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from secfunet.service.doorkeeper import METRICS_BOUNDS, DoorBounds, Doorkeeper, Visit

_MAX_HEAD: Final = 8192


class MetricsServer:
    """Serves ``registry`` at 127.0.0.1; does nothing without a port. ``start`` raises OSError."""

    def __init__(self, registry: CollectorRegistry, port: int | None, *, bounds: DoorBounds = METRICS_BOUNDS) -> None:
        self._registry = registry
        self._port = port
        self._bounds = bounds
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begins to serve. Raises OSError."""
        if self._port is None:
            return
        begun: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(begun)), name="metrics", daemon=True)
        self._thread.start()
        begun.result()

    def close(self) -> None:
        """Serves no longer."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=2)
        self._thread = None

    async def _run(self, begun: Future[None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            door = await Doorkeeper(self._bounds).open("metrics", self._serve, "127.0.0.1", self._port or 0)
        except BaseException as error:  # noqa: BLE001 - it is raised where the server was started
            begun.set_exception(error)
            return
        begun.set_result(None)
        await self._stop.wait()
        door.close()
        door.end_all()
        await door.wait_closed()

    async def _serve(self, visit: Visit) -> None:
        """One request. Its time is that of a handshake: nobody is ever "inside"."""
        reader, writer = await asyncio.open_connection(sock=visit.take(), limit=_MAX_HEAD)
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                return
            writer.write(self._answer(head))
            await writer.drain()
            writer.write_eof()
            # The answer is only thrown away by a reset if the peer's bytes are left unread: it closes first.
            await reader.read(1)
        finally:
            writer.transport.abort()

    def _answer(self, untrusted_head: bytes) -> bytes:
        lines = untrusted_head.decode("latin-1").split("\r\n")
        method, _, rest = lines[0].partition(" ")
        if method not in ("GET", "HEAD") or rest.partition(" ")[0].partition("?")[0] not in ("/metrics", "/"):
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        accepted = [line.partition(":")[2].strip() for line in lines[1:] if line.lower().startswith("accept:")]
        encode, content_type = choose_encoder(accepted[0] if accepted else "")
        body = encode(self._registry)
        answer = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return answer.encode("latin-1") + (body if method == "GET" else b"")
