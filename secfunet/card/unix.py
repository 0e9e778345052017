"""A card behind a Unix socket. We are the reader's side of the vpcd framing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from secfunet.card.errors import CardBusyError, CardGoneError
from secfunet.card.exchange import ANSWER_TIMEOUT, FramedCard
from secfunet.card.ports import CardPort
from secfunet.card.vpcd import Control, FrameDecoder, encode_control, encode_frame


class _UnixCard(FramedCard[bytes]):
    """Implements PipeliningPort."""

    max_out = 2

    def __init__(self, path: Path, answer_timeout: float) -> None:
        super().__init__(f"the card at {path}", FrameDecoder(), answer_timeout)
        self.is_powered = False

    async def transmit(self, command: bytes) -> bytes:
        (response,) = await self.transmit_many((command,))
        return response

    async def transmit_many(self, commands: Sequence[bytes]) -> list[bytes]:
        responses = await self.request(b"".join(map(encode_frame, commands)), len(commands))
        if any(len(response) < 2 for response in responses):
            self.abort()
            raise self.gone()
        return responses

    async def reset(self, *, cold: bool = False) -> bytes:
        control = Control.POWER_ON if cold else Control.RESET
        (answer,) = await self.request(encode_control(control) + encode_control(Control.GET_ATR))
        return answer

    async def power_on(self) -> None:
        """Cold start; returns when the card has answered with its ATR. A card that is never powered on so is dropped."""
        await self.reset(cold=True)
        self.is_powered = True

    async def close(self) -> None:
        def power_off(transport: asyncio.Transport) -> None:
            with contextlib.suppress(OSError):
                transport.write(encode_control(Control.POWER_OFF))

        await self.finish(power_off)


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
    except PermissionError as error:
        raise CardGoneError(f"{path}: this user may not speak to the card there ({error.strerror})") from error
    except OSError as error:
        raise CardGoneError(f"no card answers at {path}: {error.strerror or error}") from None
    finally:
        if card is not None and not card.is_powered:
            card.abort()
