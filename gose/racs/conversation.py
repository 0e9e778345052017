"""One connection's two halves: requests are read ahead (a few), and answered in their order.

The half that reads notices at once that the user is gone; then the other half stops, whatever its card is doing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gose.racs.metrics import NodeMetrics
from gose.racs.session import Session
from gose.racs.settings import NodeLimits
from secfunet.racs.errors import RacsProtocolError
from secfunet.racs.server import Request, ServerConnection
from secfunet.service.flood_log import FloodLog

_flood = FloodLog(logging.getLogger(__name__))  # one for all sessions: a user opens as many as it likes

_PIECE = 65536


class Conversation:
    """``run`` returns when the session is over: ended by the user, idle for too long, malformed, or with an expired certificate."""

    def __init__(
        self,
        session: Session,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: NodeLimits,
        clock: Callable[[], float],
        metrics: NodeMetrics,
    ) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._requests: asyncio.Queue[Request | None] = asyncio.Queue(limits.requests_waiting)
        self._last_words = b""
        self._is_working = False

    async def run(self) -> None:
        """Raises OSError when the connection breaks."""
        answering = asyncio.create_task(self._answer())
        reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait((answering, reading), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not reading.cancelled() and reading.exception() is None and self._last_words:
                # What came before the fault is still answered.
                await answering
        finally:
            for task in (answering, reading):
                task.cancel()
            outcomes = await asyncio.gather(answering, reading, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _read(self) -> None:
        connection = ServerConnection()
        loop = asyncio.get_running_loop()
        limits = self._limits
        deadline: float | None = None  # of a request that has begun
        while True:
            if connection.is_idle:
                deadline = None
            elif deadline is None:
                deadline = loop.time() + limits.request_timeout
            try:
                async with asyncio.timeout_at(loop.time() + limits.idle_timeout if deadline is None else deadline):
                    untrusted = await self._reader.read(_PIECE)
            except TimeoutError:
                # An answer may take as long as its cards; only then does the time without a request begin.
                if deadline is None and (self._is_working or not self._requests.empty()):
                    continue
                _flood.info("silent", "a session says nothing", {"user": self._session.user.label})
                return
            connection.receive(untrusted)
            try:
                while (request := connection.next_request()) is not None:
                    await self._requests.put(request)
            except RacsProtocolError as error:
                self._metrics.malformed.inc()
                _flood.warning(
                    "malformed", "a session is malformed", {"user": self._session.user.label, "cause": str(error)}
                )
                self._last_words = error.answer
                await self._requests.put(None)
                return
            if connection.is_closed:
                return

    async def _answer(self) -> None:
        while (request := await self._requests.get()) is not None:
            if self._clock() > self._session.user.ends_at:
                _flood.warning("ended", "a certificate has expired", {"user": self._session.user.label})
                return
            self._is_working = True
            try:
                self._writer.write(await self._session.answer(request))
            finally:
                self._is_working = False
            async with asyncio.timeout(self._limits.request_timeout):
                await self._writer.drain()
        self._writer.write(self._last_words)
