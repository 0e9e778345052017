"""A card at the other end of a stream: requests go out in frames, and one answer comes back for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar, cast

from secfunet.card.errors import CardGoneError
from secfunet.errors import SecFuNetError

ANSWER_TIMEOUT: Final = 120.0
"""A card that has not answered after so many seconds is given up (an RSA-4096 key pair may take tens of them)."""

Answer = TypeVar("Answer")


class Decoder(Protocol[Answer]):
    """Cuts what comes into answers; raises a SecFuNetError for bytes that are none."""

    def feed(self, untrusted: bytes) -> list[Answer]: ...


class FramedCard(asyncio.Protocol, Generic[Answer]):
    """What ports over a stream share. At most one request is out; the next one waits for its answers, wanted or not.

    ``name`` is what errors call the card.
    """

    def __init__(self, name: str, decoder: Decoder[Answer], answer_timeout: float) -> None:
        self._name = name
        self._answer_timeout = answer_timeout
        self._decoder = decoder
        self._turn = asyncio.Lock()
        self._answer: asyncio.Future[list[Answer]] | None = None
        self._answers: list[Answer] = []
        self._missing = 0  # answers to the request that is out
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
            if not self._missing:
                self.abort()  # an answer that nobody asked for: we no longer know what answers what
                return
            self._answers.append(answer)
            self._missing -= 1
            if not self._missing:
                self._settle_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._missing = 0
        self._settle_answer()
        if not self._lost.done():
            self._lost.set_result(None)

    def _settle_answer(self) -> None:
        """The request is over: it has the answers that came, or it fails if none did."""
        answer, self._answer = self._answer, None
        answers, self._answers = self._answers, []
        if answer is None or answer.done():
            return
        if answers:
            answer.set_result(answers)
        else:
            answer.set_exception(self.gone())

    # For ports

    async def request(self, frames: bytes, answers: int = 1) -> list[Answer]:
        """Sends ``frames`` and returns the ``answers`` to them, or those that came before the connection was lost. Raises CardGoneError."""
        async with self._turn:
            await self._settle()
            if self._transport is None:
                raise self.gone()
            self._answer = answer = asyncio.get_running_loop().create_future()
            self._missing = answers
            self._transport.write(frames)
            return await self._wait_for(answer)

    async def _settle(self) -> None:
        """Waits for the answer to a request whose caller was cancelled, and drops it."""
        while (answer := self._answer) is not None:
            if answer.cancelled():
                self._answer = answer = asyncio.get_running_loop().create_future()
            await self._wait_for(answer)

    async def _wait_for(self, answer: asyncio.Future[list[Answer]]) -> list[Answer]:
        try:
            async with asyncio.timeout(self._answer_timeout):
                return await answer
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
