"""The card's Unix socket: one client at a time.

A second client's connection is closed, at once or, if the first one is just leaving, after a moment of grace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import Final

from secure_element.card_os import CardOs
from secure_element.errors import SecureElementError
from secure_element.latency import LatencyModel
from secure_element.session import CardHost, Observer, Session

log = logging.getLogger(__name__)

GRACE: Final = 0.1
"""How long a second client waits for the first to go, seconds."""


class SocketInUseError(SecureElementError):
    """Another process serves the socket."""


class CardServer(CardHost):
    """Serves ``card`` at the Unix socket ``path`` while it is entered as a context. Raises SocketInUseError if another process does."""

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

    async def __aenter__(self) -> CardServer:
        self._free_path()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(self._socket_mode)  # nobody can connect before listen()
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: Session(self), sock=listener)
        except BaseException:
            listener.close()
            raise
        log.info("card is served", extra={"socket": str(self._path)})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for session in (self._next, self._session):
            if session is not None and session.transport is not None:
                session.transport.abort()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        await self.end_work()

    def _free_path(self) -> None:
        """Removes what a killed card left behind."""
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise SocketInUseError(f"{self._path} exists and is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(self._path))
            except ConnectionRefusedError:
                self._path.unlink()
                return
        raise SocketInUseError(f"another process serves {self._path}")

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
