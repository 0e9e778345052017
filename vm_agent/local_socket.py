"""The agent's door: a Unix socket whose callers the kernel names.

gRPC does not tell who is at the other end of a Unix socket. So the agent listens itself, with the socket's owner, group and mode set
before the first connection can be made, asks the kernel for each caller's uid and pid (SO_PEERCRED, unix(7)), logs them, holds the
number of connections within its limit (a part of which is kept free of any one user: ``share_of``), and passes the bytes on to the gRPC
server on an inner socket in a folder that only the agent can enter. The inner connection is bound to a name that carries the uid, so
that a handler can read it (``caller_uid``).
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import secrets
import socket
import struct
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from secfunet.service.unix_socket import OwnSocket, SocketInUse, SocketPathError, bind_unix
from vm_agent.errors import AgentError
from vm_agent.options import AgentOptions

log = logging.getLogger(__name__)

BACKLOG = 128
BUFFER_BYTES = 65536
MAX_EARLY = 4 * BUFFER_BYTES  # bytes that are kept for a caller who is not yet connected inside
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class DoorError(AgentError):
    """The socket cannot be offered; the text says why."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who opened a connection, as the kernel says."""

    pid: int
    uid: int
    gid: int


class _Half(asyncio.BufferedProtocol):
    """One side of a relayed connection: whatever it reads, the other side writes."""

    def __init__(self) -> None:
        self.other: _Half | None = None
        self.transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._early = bytearray()

    def connect(self, other: _Half) -> None:
        """From now on what comes goes to ``other``, and first what came before."""
        self.other = other
        if self._early and other.transport is not None:
            other.transport.write(bytes(self._early))
        self._early.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a stream transport is needed")
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(bytes(self._buffer[:nbytes]))
            return
        # Reading was paused when the connection was made, but asyncio up to 3.11.3 begins to read all the same.
        self._early += self._buffer[:nbytes]
        if len(self._early) > MAX_EARLY and self.transport is not None:
            self.transport.abort()

    def eof_received(self) -> bool:
        return False  # HTTP/2 has no half-closed connection: both sides close, after what they still had to write

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()


class _Outer(_Half):
    def __init__(self, door: LocalDoor) -> None:
        super().__init__()
        self._door = door
        self.uid = -1  # once it is admitted
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is not None:
            self.transport.pause_reading()
            self._task = asyncio.create_task(self._door.admit(self), name="vm-agent-door")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._door.left(self)


class LocalDoor:
    """Listens at ``options.socket``; async context manager. ``inner`` is where the gRPC server must listen, in a private folder."""

    def __init__(self, options: AgentOptions, inner: Path) -> None:
        self._path = options.socket
        self._group = options.group
        self._limit = options.limits.connections
        self._inner = inner
        self._numbers = count(1)
        self._inside: set[_Outer] = set()
        self._server: asyncio.Server | None = None
        self._own: OwnSocket | None = None
        # Not to be guessed by another process of the same user that could enter the private folder anyway; it keeps names apart.
        self._nonce = secrets.token_hex(4)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._inside)

    async def __aenter__(self) -> LocalDoor:
        listener, self._own = listen(self._path, self._group)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Outer(self), sock=listener, backlog=BACKLOG)
        return self

    def stop_listening(self) -> None:
        """No new connections; those that are open go on."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._own is not None:
            self._own.remove()

    async def __aexit__(self, *_: object) -> None:
        self.stop_listening()
        for outer in list(self._inside):
            if outer.transport is not None:
                outer.transport.close()

    async def admit(self, outer: _Outer) -> None:
        """Names the caller, then connects it to the gRPC server; or closes it."""
        if outer.transport is None:
            return
        caller = peer_of(outer.transport.get_extra_info("socket"))
        facts = {"uid": caller.uid, "pid": caller.pid}
        theirs = sum(other.uid == caller.uid for other in self._inside)
        if len(self._inside) >= self._limit or theirs >= share_of(self._limit):
            log.warning("a local program was turned away: too many connections", extra=facts)
            outer.transport.abort()
            return
        outer.uid = caller.uid
        self._inside.add(outer)
        log.info("a local program connected", extra=facts)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            connection.bind(f"\0secfunet-agent-{os.getpid()}-{self._nonce}-{next(self._numbers)}-uid-{caller.uid}")
            connection.connect(str(self._inner))
            half = _Half()
            half.other = outer
            await asyncio.get_running_loop().create_connection(lambda: half, sock=connection)
        except OSError as error:
            connection.close()
            log.warning("a local program could not be served: %s", error, extra=facts)
            outer.transport.abort()
            return
        outer.connect(half)
        if outer.transport.is_closing():
            if half.transport is not None:
                half.transport.close()
            return
        outer.transport.resume_reading()

    def left(self, outer: _Outer) -> None:
        """The connection is over."""
        self._inside.discard(outer)


def share_of(limit: int) -> int:
    """How much of what there is for all users of this VM one of them may take: a quarter is left to the others."""
    return max(1, limit - limit // 4)


def peer_of(connection: socket.socket) -> Caller:
    """Who connected, by SO_PEERCRED."""
    return Caller(*_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


def caller_uid(peer: str) -> int | None:
    """The uid in ``grpc.ServicerContext.peer()`` of a connection that came through the door."""
    name, _, uid = peer.rpartition("-uid-")
    return int(uid) if name.startswith("unix-abstract:") and uid.isdecimal() else None


def listen(path: Path, group: str | None) -> tuple[socket.socket, OwnSocket]:
    """A listening socket that only its owner, or also ``group`` (mode 0660), may open, and its file.

    Raises DoorError.
    """
    try:
        number = None if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise DoorError(f"there is no group '{group}' to open {path} to") from None
    try:
        return bind_unix(path, mode=0o600 if group is None else 0o660, group=number, backlog=BACKLOG)
    except SocketInUse:
        raise DoorError(f"another agent serves at {path}") from None
    except SocketPathError as error:
        raise DoorError(str(error)) from error
