"""One reader's connection to the card: vpcd frames in, answers out, whichever of the two connected.

A command that takes long runs in a thread; meanwhile the answer to reset is still given. When the reader goes, the card is powered off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, cast

from secfunet.card.errors import CardFormatError
from secfunet.card.vpcd import Control, FrameDecoder, encode_frame
from secfunet.service.flood_log import FloodLog
from secure_element.card_os import CardOs
from secure_element.latency import LatencyModel

_flood = FloodLog(logging.getLogger(__name__))

MAX_WAITING_FRAMES: Final = 16
MAX_EARLY: Final = 256 * 1024  # bytes of a client that waits for the card
MAX_UNREAD: Final = 1024 * 1024
MAX_TOGETHER: Final = 64 * 1024
"""Bytes of answers that are gathered for one write."""

Observer = Callable[[str, int, float], None]
"""Told of every command: its name, the status word, and how long it took (seconds)."""


class CardHost:
    """What has a card and does the work for its sessions."""

    def __init__(self, card: CardOs, observe: Observer | None = None, latency: LatencyModel | None = None) -> None:
        """With ``latency`` each answer waits until a card of hardware would have had it (for benchmarks only)."""
        self.card = card
        self._observe = observe
        self._latency = latency
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="card")

    def admit(self, session: Session) -> None:
        """A connection was made: starts the session, or does away with it."""
        raise NotImplementedError

    def release(self, session: Session) -> None:
        """A connection is gone, and so is the work that it had ordered."""
        raise NotImplementedError

    def powered(self, session: Session) -> None:
        """The reader has given the card power."""

    def process(self, command: bytes) -> bytes:
        """One command, now."""
        started = time.perf_counter()
        response = self.card.process(command)
        if self._observe is not None:
            self._observe(self.card.name_of(command), int.from_bytes(response[-2:]), time.perf_counter() - started)
        return response

    @property
    def is_slow(self) -> bool:
        """Whether every command takes time."""
        return self._latency is not None

    async def process_late(self, command: bytes, lost: asyncio.Event) -> bytes:
        """One command that takes time: in the card's thread if it computes for long, and not before the model of a card's speed says so,
        or the client is gone (``lost``), which takes the power away.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        if CardOs.takes_long(command):
            response = await loop.run_in_executor(self._executor, self.process, command)
        else:
            response = self.process(command)
        if self._latency is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(began + self._latency.seconds(command, self.card.work)):
                    await lost.wait()
        return response

    async def end_work(self) -> None:
        """Waits for the card's thread, and powers the card off."""
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
        self.card.reset()


class Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, host: CardHost) -> None:
        self._host = host
        self._decoder = FrameDecoder()
        self._waiting: deque[bytes] = deque()
        self._work: asyncio.Task[None] | None = None
        self._answers: list[bytes] | None = None  # those to the frames of one read leave together
        self._answers_size = 0
        self._is_started = False
        self._early = bytearray()
        self._is_powered = False
        self._is_dropped = False
        self._lost = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self._host.admit(self)

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
        self._lost.set()
        self._waiting.clear()
        if self._work is None:
            self._host.release(self)

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
        elif CardOs.takes_long(body) or self._host.is_slow:
            self._work = asyncio.create_task(self._do_long(body))
        else:
            self._write(self._host.process(body))

    async def _do_long(self, body: bytes) -> None:
        try:
            response = await self._host.process_late(body, self._lost)
        finally:
            self._work = None
        self._write(response)
        while self._waiting and self._work is None:
            self._do(self._waiting.popleft())
        if self._lost.is_set() and self._work is None:
            self._host.release(self)

    def _control(self, number: int) -> None:
        if number not in (Control.POWER_OFF, Control.POWER_ON, Control.RESET):
            self._drop("unknown control")
            return
        self._is_powered = number != Control.POWER_OFF
        self._host.card.reset()
        if self._is_powered:
            self._host.powered(self)

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
        _flood.warning(reason, "client dropped")
        self._send_answers()
        self._waiting.clear()
        if self.transport is not None:
            self.transport.abort()
