"""The agent's door: a Unix socket whose callers the kernel names.

gRPC does not tell who is at the other end of a Unix socket. So the agent listens itself, with the socket's owner, group and mode set
before the first connection can be made, asks the kernel for each caller's uid and pid (SO_PEERCRED, unix(7)), logs them, holds the
number of connections within its limit (a part of which is kept free of any one user: ``share_of``), and passes the bytes on to the gRPC
server behind it (``secfunet.service.inner``), whose handlers ask it who calls (``LocalDoor.uid``).
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import socket
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from secfunet.service.flood_log import FloodLog, excerpt
from secfunet.service.inner import Half, InnerServer
from secfunet.service.unix_socket import OwnSocket, SocketInUse, SocketPathError, bind_unix
from vm_agent.errors import AgentError
from vm_agent.options import AgentOptions

log = logging.getLogger(__name__)

BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_MAX_EXECUTABLE = 200  # characters


class DoorError(AgentError):
    """The socket cannot be offered; the text says why."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who opened a connection, as the kernel says. ``executable``: what it ran then."""

    pid: int
    uid: int
    gid: int
    executable: str = ""


class _Outer(Half):
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
        self._inner: InnerServer[Caller] = InnerServer(inner)
        self._flood = FloodLog(log)
        self._inside: set[_Outer] = set()
        self._server: asyncio.Server | None = None
        self._own: OwnSocket | None = None

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._inside)

    def caller(self, peer: str) -> Caller | None:
        """Who is at the other end of the connection of ``grpc.ServicerContext.peer()``; None if it did not come through this door."""
        return self._inner.who(peer)

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
            self._flood.warning(
                f"uid {caller.uid} has too many", "a local program was turned away: too many connections", facts
            )
            outer.transport.abort()
            return
        outer.uid = caller.uid
        self._inside.add(outer)
        self._flood.info(f"uid {caller.uid} connects", "a local program connected", facts)
        try:
            outer.connect(await self._inner.connect(replace(caller, executable=executable_of(caller.pid))))
        except OSError as error:
            self._flood.warning("inner", "a local program could not be served", {**facts, "cause": str(error)})
            outer.transport.abort()
            return
        if not outer.transport.is_closing():
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


def executable_of(pid: int) -> str:
    """Path of what the process runs now; its short name where another user's path is not shown; "" if it is gone."""
    process = Path("/proc", str(pid))
    with contextlib.suppress(OSError):
        return excerpt((process / "exe").readlink(), _MAX_EXECUTABLE)
    with contextlib.suppress(OSError, ValueError):
        return excerpt((process / "comm").read_text().strip(), _MAX_EXECUTABLE)
    return ""


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
