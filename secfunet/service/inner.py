"""A gRPC server behind a door of ours: who is at the other end of each of its connections.

gRPC accepts by itself, without bounds of ours, and does not say who is at the other end of a Unix socket. So the program listens itself
and passes bytes on to the gRPC server, which listens at an inner Unix socket, in a folder that only the program can enter. Each inner
connection is bound to an abstract name (unix(7)) of 16 random bytes; gRPC tells it to its handlers, and it is looked up here. Abstract
names have no owner: one that can be guessed can be taken by anybody on the host.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from pathlib import Path
from typing import Final, Generic, TypeVar

Facts = TypeVar("Facts")

_BUFFER_BYTES: Final = 65536
_MAX_EARLY: Final = 4 * _BUFFER_BYTES  # bytes that are kept for a caller who is not yet connected inside
_ATTEMPTS: Final = 8
_PREFIX: Final = "unix-abstract:"


class Half(asyncio.BufferedProtocol):
    """One side of a relayed connection: whatever it reads, the other side writes."""

    def __init__(self) -> None:
        self.other: Half | None = None
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._early = bytearray()

    def connect(self, other: Half) -> None:
        """From now on what comes goes to ``other``, and first what came before."""
        self.other = other
        other.other = self
        if other.transport is None:
            return
        if self._early:
            other.transport.write(bytes(self._early))
            self._early.clear()
        if self.transport is not None and self.transport.is_closing():
            other.transport.close()

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
        if len(self._early) > _MAX_EARLY and self.transport is not None:
            self.transport.abort()

    def eof_received(self) -> bool:
        return False  # HTTP/2 has no half-closed connection: both sides close, after what they still had to write

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()


class InnerServer(Generic[Facts]):
    """The way to the gRPC server that listens at ``path``, in a folder of mode 0700."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._callers: dict[str, Facts] = {}

    def who(self, peer: str) -> Facts | None:
        """What ``connect`` was told of the connection of ``grpc.ServicerContext.peer()``; None for one that came another way."""
        return self._callers.get(peer.removeprefix(_PREFIX)) if peer.startswith(_PREFIX) else None

    async def connect(self, facts: Facts) -> Half:
        """A new connection to the server, known under ``facts`` until it ends. Raises OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        name = ""
        try:
            name = _bind_random(connection)
            self._callers[name] = facts
            connection.connect(str(self.path))
            half = Half()
            await asyncio.get_running_loop().create_connection(lambda: half, sock=connection)
        except BaseException:
            connection.close()
            self._callers.pop(name, None)
            raise
        half.lost.add_done_callback(lambda _: self._callers.pop(name, None))
        return half


def _bind_random(connection: socket.socket) -> str:
    for attempt in range(_ATTEMPTS):
        name = secrets.token_hex(16)
        try:
            connection.bind(f"\0{name}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE or attempt == _ATTEMPTS - 1:
                raise
        else:
            return name
    raise AssertionError("the loop returns or raises")
