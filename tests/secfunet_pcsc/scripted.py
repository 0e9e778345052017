"""A card that a test plays itself: it attaches to a virtual reader, and keeps what it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from demo.readers import VirtualReader, await_card
from secfunet.card.vpcd import Control, FrameDecoder, encode_frame

LOOK = 0.6
"""Seconds in which a reader has noticed that its card is gone: pcscd does not get over an exchange in between without being told again."""


class ScriptedCard(asyncio.Protocol):
    """``answer`` makes the response to each command; None: the card says nothing."""

    def __init__(self, atr: bytes, answer: Callable[[bytes], bytes | None]) -> None:
        self.controls: list[int] = []
        self.commands: list[bytes] = []
        self.transport: asyncio.Transport | None = None
        self._atr = atr
        self._answer = answer
        self._decoder = FrameDecoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        for body in self._decoder.feed(data):
            if body == bytes((Control.GET_ATR,)):
                self.transport.write(encode_frame(self._atr))
            elif len(body) == 1:
                self.controls.append(body[0])
            else:
                self.commands.append(body)
                response = self._answer(body)
                if response is not None:
                    self.transport.write(encode_frame(response))

    def pull(self) -> None:
        """The card is taken out of the reader."""
        assert self.transport is not None
        self.transport.abort()


@contextlib.asynccontextmanager
async def scripted_card(
    reader: VirtualReader, answer: Callable[[bytes], bytes | None], *, atr: str = "3B80800101"
) -> AsyncIterator[ScriptedCard]:
    """In ``reader`` until the context ends."""
    loop = asyncio.get_running_loop()
    _, card = await loop.create_connection(lambda: ScriptedCard(bytes.fromhex(atr), answer), "127.0.0.1", reader.port)
    try:
        await await_card(reader.place)
        yield card
    finally:
        card.pull()
        await asyncio.sleep(LOOK)
