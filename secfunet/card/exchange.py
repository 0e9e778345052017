"""A card at the other end of a stream: requests go out in frames, and one answer comes back for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, Protocol, TypeVar, cast

from secfunet.card.errors import CardGoneError
from secfunet.errors import SecFuNetError

ANSWER_TIMEOUT: Final = 120.0
"""A card that has not answered after so many seconds is given up (an RSA-4096 key pair may take tens of them)."""

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Decoder(Protocol[Answer]):
    """Cuts what comes into answers; raises a SecFuNetError for bytes that are none."""

    def feed(self, untrusted: bytes) -> list[Answer]: ...


class _Request(Generic[Answer]):
    """One or several frames that are out, and the answers to them that came."""

    def __init__(self, answers: int) -> None:
        self.missing = answers
        self.answers: list[Answer] = []
        self.result: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()

    def end(self, error: Exception) -> None:
        """It has the answers that came; ``error`` if none did."""
        if not self.result.done():
            if self.answers:
                self.result.set_result(self.answers)
            else:
                self.result.set_exception(error)
        self.over.set()


class FramedCard(asyncio.Protocol, Generic[Answer]):
    """What ports over a stream share. At most ``max_out`` requests are out: the one that the card works on, and those that may follow it.
    One whose caller was cancelled is waited for, and its answers dropped, before the next goes out.

    ``name`` is what errors call the card.
    """

    max_out = 1

    def __init__(self, name: str, decoder: Decoder[Answer], answer_timeout: float) -> None:
        self._name = name
        self._answer_timeout = answer_timeout
        self._decoder = decoder
        self._turn = asyncio.Lock()
        self._out: deque[_Request[Answer]] = deque()
        self._transport: asyncio.Transport | None = None
        self._lost = asyncio.get_running_loop().create_future()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            answers = self._decoder.feed(data)
        except SecFuNetError:
            self.abort()
            return
        for answer in answers:
            if not self._out:
                self.abort()  # an answer that nobody asked for: we no longer know what answers what
                return
            request = self._out[0]
            request.answers.append(answer)
            request.missing -= 1
            if not request.missing:
                self._out.popleft().end(self.gone())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        while self._out:
            self._out.popleft().end(self.gone())
        if not self._lost.done():
            self._lost.set_result(None)

    # For ports

    async def request(self, frames: bytes, answers: int = 1) -> list[Answer]:
        """Sends ``frames`` and returns the ``answers`` to them, or those that came before the connection was lost. Raises CardGoneError."""
        async with self._turn:
            while self._out and (len(self._out) >= self.max_out or any(one.result.cancelled() for one in self._out)):
                await self._wait_for(self._out[0].over.wait())
            if self._transport is None:
                raise self.gone()
            request: _Request[Answer] = _Request(answers)
            self._out.append(request)
            self._transport.write(frames)
        return await self._wait_for(request.result)

    async def _wait_for(self, something: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout(self._answer_timeout):
                return await something
        except TimeoutError:
            self.abort()
            raise self.gone() from None

    async def finish(self, farewell: Callable[[asyncio.Transport], None]) -> None:
        """Says ``farewell``, closes the connection and waits for its end."""
        if self._transport is not None:
            farewell(self._transport)
            self._transport.close()
        await asyncio.shield(self._lost)

    def abort(self) -> None:
        """Drops the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def gone(self) -> CardGoneError:
        """What to raise for a connection that was lost."""
        return CardGoneError(f"the connection to {self._name} was lost")
