"""The door of a gRPC server that strangers reach: bounded as every other door (``doorkeeper``), with a part for those who were admitted.

gRPC itself would hold whatever connects for as long as a handshake may take, without a bound by address, and its own bound does not
tell strangers from others. So the door listens, and TLS passes through it to the server, which listens in a private folder (``inner``).
A connection counts as admitted with its first call: the server then has verified its certificate, and its guard says whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from secfunet.service.doorkeeper import DoorFullError, Doorkeeper, Doorway, Visit
from secfunet.service.inner import Half, InnerServer
from secfunet.service.tcp import watch_peer
from secfunet.service.unix_socket import unix_target

DEAD_PEER_TIMEOUT: Final = 60.0  # seconds
_HANDSHAKE_RECORD: Final = b"\x16"


class GrpcDoor:
    """Made before the server is started; ``open`` after it."""

    def __init__(self, keeper: Doorkeeper, name: str, *, inside: int) -> None:
        """``inside``: connections whose callers are admitted; one holder has three quarters of them at most."""
        self._keeper = keeper
        self._name = name
        self._inside = inside
        self._folder = Path(tempfile.mkdtemp(prefix="secfunet-"))  # mode 0700
        self._inner: InnerServer[Visit] = InnerServer(self._folder / "s")
        self._doorway: Doorway | None = None

    def bind(self, server: grpc.aio.Server, credentials: grpc.ServerCredentials) -> None:
        """Has the server listen behind the door. Raises RuntimeError."""
        server.add_secure_port(unix_target(self._inner.path), credentials)

    async def open(self, host: str, port: int) -> None:
        """Listens. Raises OSError."""
        self._doorway = await self._keeper.open(
            self._name, self._serve, host, port, inside=self._inside, per_holder=max(1, 3 * self._inside // 4)
        )

    @property
    def connections(self) -> int:
        """Of admitted callers."""
        return len(self._doorway.inside) if self._doorway is not None else 0

    def admitted(self, peer: str, holder: str) -> None:
        """The connection of ``grpc.ServicerContext.peer()`` made a call with the certificate of ``holder``. Raises DoorFullError."""
        visit = self._inner.who(peer)
        if visit is None or visit.busy:
            return
        visit.busy = True
        try:
            visit.enter(holder)
        except DoorFullError:
            visit.busy = False
            if visit.task is not None:
                visit.task.cancel()
            raise

    def peer(self, peer: str) -> str:
        """From where the connection of ``grpc.ServicerContext.peer()`` comes, for logs."""
        visit = self._inner.who(peer)
        return visit.peer if visit is not None else peer

    def close(self) -> None:
        """Nobody new; those inside go on until the server ends them."""
        if self._doorway is not None:
            self._doorway.close()

    async def wait_closed(self) -> None:
        """Ends what is left; the server has stopped."""
        if self._doorway is not None:
            self._doorway.end_all()
            await self._doorway.wait_closed()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _serve(self, visit: Visit) -> None:
        if visit.socket.recv(1, socket.MSG_PEEK) != _HANDSHAKE_RECORD:
            return  # what is not TLS is not worth a connection to the server
        watch_peer(visit.socket, DEAD_PEER_TIMEOUT)
        loop = asyncio.get_running_loop()
        outer = Half()
        inner: Half | None = None
        await loop.connect_accepted_socket(lambda: outer, visit.take())
        try:
            if outer.transport is not None:
                outer.transport.pause_reading()
            inner = await self._inner.connect(visit)
            outer.connect(inner)
            if outer.transport is not None and not outer.transport.is_closing():
                outer.transport.resume_reading()
            await outer.lost
            # What the client still sent is on its way to the server.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await asyncio.shield(inner.lost)
        finally:
            for half in (outer, inner):
                if half is not None and half.transport is not None:
                    half.transport.abort()
