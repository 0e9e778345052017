"""The way to a RADIUS server: a UDP socket for one authentication, requests that are repeated until they are answered (RFC 5080, 2.2.1)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

from secfunet.radius.access import AccessAnswer, AccessRequest
from secfunet.radius.errors import RadiusFormatError, RadiusSilenceError

log = logging.getLogger(__name__)

FIRST_WAIT: Final = 1.0
"""Seconds until a request is repeated for the first time; then twice as long, and so on."""
MAX_WAITING: Final = 64
"""Packets that wait to be looked at; more are dropped, as a network does."""


class RadiusPort(asyncio.DatagramProtocol):
    """One request at a time to one server. ``patience``: seconds until a request that nobody answers is given up."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)
        self._transport: asyncio.DatagramTransport | None = None

    async def exchange(self, request: AccessRequest) -> AccessAnswer:
        """The server's answer. Whatever else arrives is dropped. Raises RadiusSilenceError."""
        if self._transport is None:
            raise RadiusSilenceError("the socket is closed")
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience
        wait = FIRST_WAIT
        while (now := loop.time()) < end:
            self._transport.sendto(request.encoded)
            answer = await self._answer(request, min(now + wait, end))
            if answer is not None:
                return answer
            wait *= 2
        raise RadiusSilenceError(
            "the RADIUS server does not answer: it is not there, does not know this client, or has another secret for it"
        )

    async def _answer(self, request: AccessRequest, until: float) -> AccessAnswer | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while True:
                    try:
                        return request.answer(await self._arrived.get())
                    except RadiusFormatError as error:
                        log.debug("a packet is dropped", extra={"cause": str(error)})
        return None

    # asyncio.DatagramProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a datagram endpoint has a datagram transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._arrived.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        log.debug("a request did not arrive", extra={"cause": str(exc)})


@contextlib.asynccontextmanager
async def radius_port(host: str, port: int, *, patience: float) -> AsyncIterator[RadiusPort]:
    """A socket that takes packets of that server only. Raises OSError."""
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: RadiusPort(patience), remote_addr=(host, port)
    )
    try:
        yield protocol
    finally:
        transport.close()
