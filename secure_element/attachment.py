"""The card in a virtual reader of pcscd: it connects to the port where the reader (vpcd) listens, again and again until it is let in.

The reader looks for a card 2.5 times a second. A card that is exchanged between two looks may leave pcscd of two minds: its answer to reset
is asked for, but no program is told that it is there. So a card stays away for longer than one look, and one that is not given power takes
itself out and comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from types import TracebackType
from typing import Final

from secure_element.card_os import CardOs
from secure_element.latency import LatencyModel
from secure_element.session import CardHost, Observer, Session

log = logging.getLogger(__name__)

PAUSE: Final = 0.6
"""Seconds between two attempts: more than between two looks of the reader."""
POWER_PATIENCE: Final = 2.0
"""Seconds after which a card that was not given power tries again."""
CONNECT_TIMEOUT: Final = 5.0
PATIENCE: Final = 3.0
"""Seconds that a card waits for its reader before it counts as started."""


class _AttachedSession(Session):
    """vpcd sends length and body apart, and would wait with the second for an acknowledgement of the first, which the kernel delays."""

    def data_received(self, data: bytes) -> None:
        self.acknowledge()
        super().data_received(data)

    def acknowledge(self) -> None:
        """At once; the kernel forgets this wish after a while (tcp(7), TCP_QUICKACK)."""
        stream = self.transport.get_extra_info("socket") if self.transport is not None else None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class CardAttachment(CardHost):
    """Keeps ``card`` attached to the virtual reader at ``address`` while it is entered as a context.

    Entering returns when the reader has given the card power, or after ``PATIENCE``: a card may be started before its reader.
    """

    def __init__(
        self,
        card: CardOs,
        address: tuple[str, int],
        *,
        observe: Observer | None = None,
        latency: LatencyModel | None = None,
    ) -> None:
        super().__init__(card, observe, latency)
        self._address = address
        self._session: Session | None = None
        self._was_powered = asyncio.Event()  # ever
        self._is_powered = asyncio.Event()  # by the reader that it is attached to
        self._detached = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> CardAttachment:
        self._task = asyncio.create_task(self._keep_attached(), name="attachment")
        try:
            async with asyncio.timeout(PATIENCE):
                await self._was_powered.wait()
        except TimeoutError:
            log.warning("no reader has given the card power yet")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.end_work()

    async def _keep_attached(self) -> None:
        host, port = self._address
        loop = asyncio.get_running_loop()
        is_reported = False
        while True:
            transport: asyncio.BaseTransport | None = None
            try:
                self._detached.clear()
                self._is_powered.clear()
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    transport, session = await loop.create_connection(lambda: _AttachedSession(self), host, port)
                session.acknowledge()
                log.info("the card is attached", extra={"reader": f"{host}:{port}"})
                is_reported = False
                await self._stay(self._detached)
                log.info("the reader has let the card go", extra={"reader": f"{host}:{port}"})
            except OSError as error:  # TimeoutError is one
                if not is_reported:
                    log.warning("no reader listens", extra={"reader": f"{host}:{port}", "cause": str(error)})
                is_reported = True
            finally:
                if transport is not None and isinstance(transport, asyncio.Transport):
                    transport.abort()
            await asyncio.sleep(PAUSE)

    async def _stay(self, detached: asyncio.Event) -> None:
        """Until the reader lets the card go, or has not given it power in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POWER_PATIENCE) as patience:
                waiting = [asyncio.create_task(event.wait()) for event in (detached, self._is_powered)]
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in waiting:
                        task.cancel()
                patience.reschedule(None)
                await detached.wait()

    def admit(self, session: Session) -> None:
        """See CardHost.admit."""
        self._session = session
        session.start()

    def release(self, session: Session) -> None:
        """See CardHost.release."""
        if session is self._session:
            self._session = None
            self.card.reset()
            self._detached.set()

    def powered(self, session: Session) -> None:
        """See CardHost.powered."""
        self._was_powered.set()
        self._is_powered.set()
