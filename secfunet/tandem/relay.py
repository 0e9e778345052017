"""A local socket in front of TLS-Tandem connections, for libraries that insist on a socket of their own (gRPC).

The library connects to a Unix socket; for each of its connections the relay opens one TLS-Tandem connection and carries the bytes. What
goes in at the local end leaves with the authority of the card, so only this very process may use it: the socket lies in a folder
that only its user may enter (0700), and the kernel names the caller's process (SO_PEERCRED), which must be our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from secfunet.errors import SecFuNetError
from secfunet.service.unix_socket import OwnSocket, SocketPathError, bind_unix, unix_target
from secfunet.tandem.errors import RelayError

_log = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""Opens one connection to the far end, for example by open_tandem_connection()."""

_PIECE: Final = 256 * 1024
_CREDENTIALS: Final = struct.Struct("3i")


async def start_relay(path: Path, connect: Connect, *, max_connections: int = 16) -> Relay:
    """Listen at ``path`` and relay each connection through one of ``connect``'s. What a dead process left at ``path`` is replaced.

    Raises RelayError when the folder is not ours alone, or the socket cannot be made (a path has at most 107 bytes).
    """
    _check_folder(path.parent)
    relay = Relay(path, connect, max_connections)
    await relay.listen()
    return relay


class Relay:
    """What start_relay() returns."""

    def __init__(self, path: Path, connect: Connect, max_connections: int) -> None:
        self._path = path
        self._connect = connect
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._own: OwnSocket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._far_writers: set[asyncio.StreamWriter] = set()
        self.last_error: Exception | None = None
        """Why the latest connection could not be opened or was lost: the library at the local end only sees it closed."""

    @property
    def target(self) -> str:
        """What gRPC calls the local end."""
        return unix_target(self._path)

    async def listen(self) -> None:
        """Begin to accept; called once, by start_relay()."""
        try:
            listener, self._own = bind_unix(self._path)
        except SocketPathError as error:
            raise RelayError(str(error)) from error
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=_PIECE)

    async def close(self) -> None:
        """Close the socket and everything that goes through it."""
        if self._own is not None:
            self._own.remove()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._server is not None:
            await self._server.wait_closed()

    def drop_connections(self) -> None:
        """Cut what goes through it now, without a word to the far side: whoever comes next is connected anew."""
        for writer in self._far_writers:
            writer.transport.abort()

    async def __aenter__(self) -> Relay:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            verify_caller(writer.get_extra_info("socket"))
            if len(self._tasks) >= self._max_connections:
                raise RelayError(f"more than {self._max_connections} connections through one relay")
        except RelayError as error:
            _log.warning("%s", error)
            self.last_error = error
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await self._connect()
            self._far_writers.add(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far_writer))
                group.create_task(_pump(far_reader, writer))
        except* (SecFuNetError, OSError) as errors:
            # gRPC tells its caller UNAVAILABLE; the reason is kept here.
            self.last_error = errors.exceptions[0]
            _log.info("a relayed connection ended: %s", self.last_error)
            writer.transport.abort()
        finally:
            if far_writer is not None:
                self._far_writers.discard(far_writer)
            for each in (writer, far_writer):
                if each is not None:
                    each.close()
                    with contextlib.suppress(OSError, SecFuNetError):
                        await each.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one direction to its end, then close that direction only."""
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()


def verify_caller(connection: socket.socket) -> None:
    """Check that the other end of a Unix socket is this process itself (SO_PEERCRED). Raises RelayError."""
    untrusted = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(untrusted)
    if pid != os.getpid():
        raise RelayError(f"process {pid} of user {uid} tried to use the relay of process {os.getpid()}")


def _check_folder(folder: Path) -> None:
    try:
        status = folder.stat()
    except OSError as error:
        raise RelayError(f"the relay's folder {folder} cannot be read: {error.strerror}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise RelayError(f"the relay's folder {folder} must belong to this user alone (mode 0700)")
