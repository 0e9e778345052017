"""The card's Unix socket: one client at a time.

A second client's connection is closed, at once or, if the first one is just leaving, after a moment of grace.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import TracebackType
from typing import Final

from secfunet.service.unix_socket import OwnSocket, bind_unix
from secure_element.card_os import CardOs
from secure_element.latency import LatencyModel
from secure_element.session import CardHost, Observer, Session

log = logging.getLogger(__name__)

GRACE: Final = 0.1
"""How long a second client waits for the first to go, seconds."""


class CardServer(CardHost):
    """Serves ``card`` at the Unix socket ``path`` while it is entered as a context. Raises SocketPathError, SocketInUse."""

    def __init__(
        self,
        card: CardOs,
        path: Path,
        *,
        socket_mode: int = 0o600,
        observe: Observer | None = None,
        latency: LatencyModel | None = None,
    ) -> None:
        super().__init__(card, observe, latency)
        self._path = path
        self._socket_mode = socket_mode
        self._session: Session | None = None
        self._next: Session | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._own: OwnSocket | None = None

    async def __aenter__(self) -> CardServer:
        listener, self._own = bind_unix(self._path, mode=self._socket_mode)
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: Session(self), sock=listener)
        except BaseException:
            self._own.remove()
            listener.close()
            raise
        log.info("card is served", extra={"socket": str(self._path)})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own is not None:
            self._own.remove()
        if self._server is not None:
            self._server.close()
        for session in (self._next, self._session):
            if session is not None and session.transport is not None:
                session.transport.abort()
        await self.end_work()

    # Whose turn it is

    def admit(self, session: Session) -> None:
        """Gives the card to a new connection, lets it wait a moment, or closes it."""
        if self._session is None:
            self._session = session
            session.start()
        elif self._next is None:
            self._next = session
            self._grace = asyncio.get_running_loop().call_later(GRACE, self._refuse_next)
        elif session.transport is not None:
            session.transport.abort()

    def _refuse_next(self) -> None:
        refused, self._next = self._next, None
        if refused is not None and refused.transport is not None:
            refused.transport.abort()

    def release(self, session: Session) -> None:
        """A connection is gone, and so is the work it had ordered."""
        if session is self._next:
            self._next = None
        if session is not self._session:
            return
        self.card.reset()
        self._session, self._next = self._next, None
        if self._grace is not None:
            self._grace.cancel()
        if self._session is not None:
            self._session.start()
