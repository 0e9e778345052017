"""The card's Unix socket: vpcd frames in and out, one client at a time.

A second client's connection is closed, at once or, if the first one is just leaving, after a moment of grace. A command that takes long
runs in a thread; meanwhile the answer to reset is still given. When the client goes, the card is powered off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import stat
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, cast

from secfunet.card.errors import CardFormatError
from secfunet.card.vpcd import Control, FrameDecoder, encode_frame
from secure_element.card_os import CardOs
from secure_element.errors import SecureElementError

log = logging.getLogger(__name__)

GRACE: Final = 0.1
"""How long a second client waits for the first to go, seconds."""

MAX_WAITING_FRAMES: Final = 16
MAX_EARLY: Final = 256 * 1024  # bytes of a client that waits for the card
MAX_UNREAD: Final = 1024 * 1024
MAX_TOGETHER: Final = 64 * 1024
"""Bytes of answers that are gathered for one write."""

Observer = Callable[[str, int, float], None]
"""Told of every command: its name, the status word, and how long it took (seconds)."""


class SocketInUseError(SecureElementError):
    """Another process serves the socket."""


class _Session(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: CardServer) -> None:
        self._server = server
        self._decoder = FrameDecoder()
        self._waiting: deque[bytes] = deque()
        self._work: asyncio.Task[None] | None = None
        self._answers: list[bytes] | None = None  # those to the frames of one read leave together
        self._answers_size = 0
        self._is_started = False
        self._early = bytearray()
        self._is_powered = False
        self._is_dropped = False
        self._is_lost = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self._server.admit(self)

    def start(self) -> None:
        """The card is this client's now."""
        self._is_started = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            if self._early:
                early = bytes(self._early)
                self._early.clear()
                self.data_received(early)

    def data_received(self, data: bytes) -> None:
        if not self._is_started:
            # Reading was paused when the connection was made, but asyncio up to 3.11.3 begins to read all the same: nothing is obeyed yet.
            self._early += data
            if len(self._early) > MAX_EARLY:
                self._drop("more than a client may send before it has the card")
            return
        self._answers = []
        try:
            for body in self._decoder.feed(data):
                self._take(body)
        except CardFormatError:
            self._drop("no frame")
        finally:
            self._send_answers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._waiting.clear()
        if self._work is None:
            self._server.release(self)

    def _take(self, body: bytes) -> None:
        if self._is_dropped:
            return  # what came in the same read as the reason is not obeyed any more
        if body == bytes((Control.GET_ATR,)):
            self._write(CardOs.atr)
        elif self._work is None:
            self._do(body)
        elif len(self._waiting) < MAX_WAITING_FRAMES:
            self._waiting.append(body)
        else:
            self._drop("too many commands at once")

    def _do(self, body: bytes) -> None:
        if len(body) == 1:
            self._control(body[0])
        elif not self._is_powered:
            self._drop("a command before power on")
        elif CardOs.takes_long(body):
            self._work = asyncio.create_task(self._do_long(body))
        else:
            self._write(self._server.process(body))

    async def _do_long(self, body: bytes) -> None:
        try:
            response = await self._server.process_aside(body)
        finally:
            self._work = None
        self._write(response)
        while self._waiting and self._work is None:
            self._do(self._waiting.popleft())
        if self._is_lost and self._work is None:
            self._server.release(self)

    def _control(self, number: int) -> None:
        if number not in (Control.POWER_OFF, Control.POWER_ON, Control.RESET):
            self._drop("unknown control")
            return
        self._is_powered = number != Control.POWER_OFF
        self._server.card.reset()

    def _write(self, body: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        frame = encode_frame(body)
        if self._answers is not None:
            self._answers.append(frame)
            self._answers_size += len(frame)
            if self._answers_size > MAX_TOGETHER:
                self._send_answers()
                self._answers = []
            return
        self.transport.write(frame)
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self._drop("answers are not read")

    def _send_answers(self) -> None:
        answers, self._answers, self._answers_size = self._answers, None, 0
        if answers and self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(answers))
            if self.transport.get_write_buffer_size() > MAX_UNREAD:
                self._drop("answers are not read")

    def _drop(self, reason: str) -> None:
        if self._is_dropped:
            return
        self._is_dropped = True
        log.warning("client dropped", extra={"reason": reason})
        self._send_answers()
        self._waiting.clear()
        if self.transport is not None:
            self.transport.abort()


class CardServer:
    """Serves ``card`` at the Unix socket ``path`` while it is entered as a context. Raises SocketInUseError if another process does."""

    def __init__(self, card: CardOs, path: Path, *, socket_mode: int = 0o600, observe: Observer | None = None) -> None:
        self.card = card
        self._path = path
        self._socket_mode = socket_mode
        self._observe = observe
        self._session: _Session | None = None
        self._next: _Session | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="card")

    async def __aenter__(self) -> CardServer:
        self._free_path()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(self._socket_mode)  # nobody can connect before listen()
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Session(self), sock=listener)
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
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
        self.card.reset()

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

    def admit(self, session: _Session) -> None:
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

    def release(self, session: _Session) -> None:
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

    # Work

    def process(self, command: bytes) -> bytes:
        """One command, now."""
        started = time.perf_counter()
        response = self.card.process(command)
        if self._observe is not None:
            self._observe(self.card.name_of(command), int.from_bytes(response[-2:]), time.perf_counter() - started)
        return response

    async def process_aside(self, command: bytes) -> bytes:
        """One command, in the card's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.process, command)
