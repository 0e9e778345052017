"""A card in a reader of pcscd as a port (``secfunet.card.ports``). Each pcscd has one worker process (``secfunet.pcsc``) a program."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from secfunet.card.errors import CardBusyError, CardFormatError, CardGoneError
from secfunet.card.exchange import ANSWER_TIMEOUT, FramedCard
from secfunet.card.ports import PipeliningPort
from secfunet.pcsc.frames import Frame, FrameDecoder, FrameError, Kind, ReaderSeen, decode_readers

CLOSE_TIMEOUT: Final = 2.0
"""Seconds that a card has to lose its power; then its worker is left alone with it."""

_KEPT_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class _Worker:
    """The process for one pcscd: started when it is first needed, and anew if it has died. It ends with this program."""

    def __init__(self, daemon: Path | None) -> None:
        self._daemon = daemon
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, if it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def connection(self) -> socket.socket:
        """A new connection to it, for one card. Raises OSError, CardGoneError."""
        if self.pid is None:
            self._start()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._send(theirs)
            except OSError:
                self._start()  # it died a moment ago
                self._send(theirs)
        ours.setblocking(False)
        return ours

    def _send(self, descriptor: socket.socket) -> None:
        if self._control is None:
            raise AssertionError("a worker that was started has a control socket")
        socket.send_fds(self._control, [b"\0"], [descriptor.fileno()])

    def _start(self) -> None:
        if importlib.util.find_spec("smartcard") is None:
            raise CardGoneError("pyscard is not installed: PC/SC readers need secfunet[pcsc]")
        if self._control is not None:
            self._control.close()
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        if self._daemon is not None:
            environment["PCSCLITE_CSOCK_NAME"] = str(self._daemon)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                (sys.executable, "-P", "-m", "secfunet.pcsc.worker"),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                cwd="/",
            )


_workers: dict[Path | None, _Worker] = {}
_lock: Final = threading.Lock()


def worker_pid(daemon: Path | None) -> int | None:
    """The process id of this program's worker for that pcscd, if it has one."""
    worker = _workers.get(daemon)
    return None if worker is None else worker.pid


class _PcscCard(FramedCard[Frame]):
    """Implements PipeliningPort: the worker takes the next commands while the card works."""

    def __init__(self, reader: str, answer_timeout: float) -> None:
        super().__init__(f"the card in the reader '{reader}'", FrameDecoder(), answer_timeout)

    async def transmit(self, command: bytes) -> bytes:
        (response,) = await self.transmit_many((command,))
        return response

    async def transmit_many(self, commands: Sequence[bytes]) -> list[bytes]:
        frames = b"".join(Frame(Kind.TRANSMIT, command).encode() for command in commands)
        responses: list[bytes] = []
        for answer in await self.request(frames, len(commands)):
            if answer.kind is not Kind.DONE:
                if not responses:
                    self._raise(answer)
                break
            responses.append(answer.body)
        return responses

    async def reset(self, *, cold: bool = False) -> bytes:
        return await self.ask(Frame(Kind.RESET_COLD if cold else Kind.RESET_WARM))

    async def close(self) -> None:
        try:
            # So that the card is free when this returns.
            with contextlib.suppress(CardGoneError, CardBusyError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self.ask(Frame(Kind.CLOSE))
        finally:
            self.abort()

    async def ask(self, request: Frame) -> bytes:
        """What the worker answers to one request. Raises CardGoneError, CardBusyError."""
        (answer,) = await self.request(request.encode())
        if answer.kind is not Kind.DONE:
            self._raise(answer)
        return answer.body

    def _raise(self, answer: Frame) -> None:
        self.abort()
        if answer.kind is Kind.BUSY:
            raise CardBusyError(answer.text)
        raise CardGoneError(answer.text if answer.kind is Kind.GONE else f"{self._name}: an answer of no known kind")


@contextlib.asynccontextmanager
async def _conversation(
    reader: str, daemon: Path | None, timeout: float, answer_timeout: float
) -> AsyncIterator[_PcscCard]:
    """A connection to the worker, which is dropped if what is done with it first fails or takes longer than ``timeout`` seconds."""
    card: _PcscCard | None = None
    is_done = False
    try:
        async with asyncio.timeout(timeout):
            with _lock:
                stream = _workers.setdefault(daemon, _Worker(daemon)).connection()
            loop = asyncio.get_running_loop()
            _, card = await loop.create_connection(lambda: _PcscCard(reader, answer_timeout), sock=stream)
            yield card
            is_done = True
    except TimeoutError:
        where = "the system's pcscd" if daemon is None else f"pcscd at {daemon}"
        raise CardGoneError(f"the reader '{reader}' of {where} does not answer within {timeout:g} s") from None
    except OSError as error:
        raise CardGoneError(f"the worker for PC/SC cannot be started: {error.strerror or error}") from None
    finally:
        if card is not None and not is_done:
            card.abort()


async def connect_pcsc(
    reader: str, daemon: Path | None = None, *, timeout: float, answer_timeout: float = ANSWER_TIMEOUT
) -> PipeliningPort:
    """Connects to the card in ``reader`` of the pcscd at ``daemon`` (None: the system's) and cold-starts it, within ``timeout`` seconds.

    The card is this program's alone until it is closed. Raises CardBusyError if somebody else has it, or if it has not answered an earlier
    command yet; CardGoneError if pcscd, the reader or the card is not there.
    """
    async with _conversation(reader, daemon, timeout, answer_timeout) as card:
        await card.ask(Frame(Kind.OPEN, reader.encode()))
    return card


async def list_readers(daemon: Path | None = None, *, timeout: float) -> tuple[ReaderSeen, ...]:
    """All readers of that pcscd. Raises CardGoneError if it does not answer, CardFormatError."""
    async with _conversation("", daemon, timeout, timeout) as worker:
        try:
            readers = decode_readers(await worker.ask(Frame(Kind.LIST)))
        except FrameError as error:
            raise CardFormatError(str(error)) from None
    worker.abort()
    return readers
