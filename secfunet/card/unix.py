"""A card behind a Unix socket. We are the reader's side of the vpcd framing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from secfunet.card.errors import CardBusyError, CardFormatError, CardGoneError
from secfunet.card.ports import CardPort
from secfunet.card.vpcd import Control, FrameDecoder, encode_control, encode_frame

ANSWER_TIMEOUT: Final = 120.0
"""A card that has not answered after so many seconds is given up (an RSA-4096 key pair may take tens of them)."""


class _UnixCard(asyncio.Protocol):
    """Implements PipeliningPort. At most one request is out; the next one waits for its answers, wanted or not."""

    def __init__(self, path: Path, answer_timeout: float) -> None:
        self._path = path
        self._answer_timeout = answer_timeout
        self._decoder = FrameDecoder()
        self._turn = asyncio.Lock()
        self._answer: asyncio.Future[list[bytes]] | None = None
        self._bodies: list[bytes] = []
        self._missing = 0  # answers to the request that is out
        self._transport: asyncio.Transport | None = None
        self.is_powered = False
        self._lost = asyncio.get_running_loop().create_future()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            bodies = self._decoder.feed(data)
        except CardFormatError:
            self.abort()
            return
        for body in bodies:
            if not self._missing:
                self.abort()  # an answer that nobody asked for: we no longer know what answers what
                return
            self._bodies.append(body)
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
        bodies, self._bodies = self._bodies, []
        if answer is None or answer.done():
            return
        if bodies:
            answer.set_result(bodies)
        else:
            answer.set_exception(self._gone())

    # CardPort

    async def transmit(self, command: bytes) -> bytes:
        (response,) = await self.transmit_many((command,))
        return response

    async def transmit_many(self, commands: Sequence[bytes]) -> list[bytes]:
        responses = await self._request(b"".join(map(encode_frame, commands)), len(commands))
        if any(len(response) < 2 for response in responses):
            self.abort()
            raise self._gone()
        return responses

    async def reset(self) -> bytes:
        (answer,) = await self._request(encode_control(Control.RESET) + encode_control(Control.GET_ATR))
        return answer

    async def power_on(self) -> None:
        """Cold start; returns when the card has answered with its ATR. A card that is never powered on so is dropped."""
        await self._request(encode_control(Control.POWER_ON) + encode_control(Control.GET_ATR))
        self.is_powered = True

    async def close(self) -> None:
        if self._transport is not None:
            with contextlib.suppress(OSError):
                self._transport.write(encode_control(Control.POWER_OFF))
            self._transport.close()
        await asyncio.shield(self._lost)

    async def _request(self, frames: bytes, answers: int = 1) -> list[bytes]:
        async with self._turn:
            await self._settle()
            if self._transport is None:
                raise self._gone()
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

    async def _wait_for(self, answer: asyncio.Future[list[bytes]]) -> list[bytes]:
        try:
            async with asyncio.timeout(self._answer_timeout):
                return await answer
        except TimeoutError:
            self.abort()
            raise self._gone() from None

    def abort(self) -> None:
        """Drops the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _gone(self) -> CardGoneError:
        return CardGoneError(f"the connection to the card at {self._path} was lost")


async def connect_unix(path: Path, *, timeout: float, answer_timeout: float = ANSWER_TIMEOUT) -> CardPort:
    """Connects to the card at the Unix socket ``path``, powers it on and reads its ATR, all within ``timeout`` seconds.

    Raises CardGoneError if no card answers there, CardBusyError if it serves another client (a card has one).
    """
    loop = asyncio.get_running_loop()
    card: _UnixCard | None = None
    try:
        async with asyncio.timeout(timeout):
            _, card = await loop.create_unix_connection(lambda: _UnixCard(path, answer_timeout), str(path))
            try:
                await card.power_on()
            except CardGoneError:
                raise CardBusyError(f"the card at {path} serves another client") from None
            return card
    except TimeoutError:
        raise CardGoneError(f"no card answers at {path} within {timeout:g} s") from None
    except OSError as error:
        raise CardGoneError(f"no card answers at {path}: {error.strerror or error}") from None
    finally:
        if card is not None and not card.is_powered:
            card.abort()
