"""A card behind a RACS server as a port (``secfunet.card.ports``): one TLS connection a card, which has it as long as it lives."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
from collections.abc import Sequence
from typing import Final

from secfunet.card.errors import CardBusyError, CardGoneError
from secfunet.card.ports import PipeliningPort
from secfunet.racs.client import ClientConnection, Response, is_in_use, is_unauthorised, response_apdu
from secfunet.racs.commands import Apdu, Command, PowerOn, Reset, Shutdown
from secfunet.racs.errors import RacsError, RacsRefusedError, RacsValueError
from secfunet.racs.syntax import MAX_COMMANDS, MAX_REQUEST, check_seid
from secfunet.service.tcp import watch_peer

log = logging.getLogger(__name__)

ANSWER_TIMEOUT: Final = 120.0
"""Seconds for the answer to one request; a card may take tens of them to make a key."""
DEAD_PEER_TIMEOUT: Final = 10.0
"""Seconds after which a server that acknowledges nothing is given up."""
CLOSE_TIMEOUT: Final = 1.0

COMMAND_NOT_ALLOWED: Final = bytes.fromhex("6986")
"""The response to a command that the server's policy does not let through (ISO 7816-4, 5.1.3): the card has not seen it."""

_PIECE: Final = 65536
_OVERHEAD: Final = 128  # characters of an APDU line beside the APDU


class _RacsCard:
    """Implements PipeliningPort: commands that come at once are lines of one request."""

    def __init__(
        self, seid: str, where: str, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], timeout: float
    ):
        self._seid = seid
        self._where = where
        self._reader, self._writer = streams
        self._timeout = timeout
        self._protocol = ClientConnection()
        self._turn = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._exchange: asyncio.Task[Response] | None = None
        self._is_closed = False

    async def transmit(self, command: bytes) -> bytes:
        (response,) = await self.transmit_many((command,))
        return response

    async def transmit_many(self, commands: Sequence[bytes]) -> list[bytes]:
        responses: list[bytes] = []
        while len(responses) < len(commands):
            try:
                responses += await self._transmit(commands[len(responses) :])
            except CardGoneError:
                if not responses:
                    raise
                break
        return responses

    async def reset(self, *, cold: bool = False) -> bytes:
        """RACS does not carry the answer to reset: it is empty here."""
        response = await self._ask([Reset(self._seid, warm=not cold)])
        try:
            response.raise_failure()
        except RacsRefusedError as error:
            raise self._gone(error) from None
        return b""

    async def power_on(self) -> None:
        """Raises CardBusyError if another session has the card, CardGoneError if the server does not give it."""
        response = await self._ask([PowerOn(self._seid)])
        try:
            response.raise_failure()
        except RacsRefusedError as error:
            if is_in_use(error):
                raise CardBusyError(f"the card {self._seid} at {self._where} serves another client") from None
            raise CardGoneError(f"{self._where} does not give the card {self._seid}: {error}") from None

    async def close(self) -> None:
        if self._is_closed:
            return
        try:
            if not self._turn.locked() and not self._protocol.is_closed:
                # So that the card is free when this returns; else it is when the server has noticed the end of the connection.
                with contextlib.suppress(CardGoneError, TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT):
                        await self._ask([Shutdown(self._seid)])
        finally:
            self.abort()

    def abort(self) -> None:
        """Drops the connection at once."""
        self._is_closed = True
        self._writer.transport.abort()

    async def _transmit(self, commands: Sequence[bytes]) -> list[bytes]:
        """As many as fit into one request, and as the server does of them: at least one."""
        lines: list[Command] = []
        size = 2 * _OVERHEAD
        for command in commands[:MAX_COMMANDS]:
            size += 2 * len(command) + _OVERHEAD
            if lines and size > MAX_REQUEST:
                break
            lines.append(Apdu(self._seid, command))
        response = await self._ask(lines)
        responses: list[bytes] = []
        for status, line in zip(response.statuses, range(1, len(lines) + 1), strict=False):
            try:
                if status.line != line:
                    raise RacsValueError("the server has left out a status")
                responses.append(response_apdu(status))
            except RacsRefusedError as error:
                if is_unauthorised(error):
                    log.warning("a node's policy refuses a command", extra={"seid": self._seid, "cause": str(error)})
                    responses.append(COMMAND_NOT_ALLOWED)
                elif responses:
                    self.abort()
                else:
                    raise self._gone(error) from None
                break
            except RacsError as error:
                raise self._gone(error) from None
        if response.failed is None and len(responses) < len(lines):
            # What was done and not answered must not be sent again.
            gone = self._gone("the server has left out a status")
            if not responses:
                raise gone
        return responses

    async def _ask(self, commands: Sequence[Command]) -> Response:
        """One request and its answer. A caller that is cancelled leaves the exchange to its end: the next one waits for it."""
        exchange = asyncio.create_task(self._do(commands))
        exchange.add_done_callback(_forget)
        return await asyncio.shield(exchange)

    async def _do(self, commands: Sequence[Command]) -> Response:
        async with self._turn:
            if self._is_closed:
                raise self._gone("it is closed")
            try:
                async with asyncio.timeout(self._timeout):
                    self._writer.write(self._protocol.send(commands, identifier=f"r{next(self._numbers)}", append=True))
                    await self._writer.drain()
                    while True:
                        response = self._protocol.receive(await self._reader.read(_PIECE))
                        if response is not None:
                            return response
            except TimeoutError:
                raise self._gone(f"no answer within {self._timeout:g} s") from None
            except (RacsError, OSError) as error:
                raise self._gone(error) from None

    def _gone(self, cause: object) -> CardGoneError:
        self.abort()
        return CardGoneError(f"the connection to the card {self._seid} at {self._where} was lost: {cause}")


def _forget(task: asyncio.Task[Response]) -> None:
    if not task.cancelled():
        task.exception()


async def connect_racs(
    host: str,
    port: int,
    seid: str,
    context: ssl.SSLContext,
    *,
    timeout: float,
    answer_timeout: float = ANSWER_TIMEOUT,
    dead_peer_timeout: float = DEAD_PEER_TIMEOUT,
) -> PipeliningPort:
    """Connects to the RACS server, whose certificate ``context`` checks against ``host``, and powers the card on; all within ``timeout``
    seconds.

    Raises CardGoneError if the server cannot be reached or does not give the card, CardBusyError if another session has it.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        check_seid(seid)
    except RacsValueError as error:
        raise CardGoneError(str(error)) from None
    card: _RacsCard | None = None
    is_powered = False
    try:
        async with asyncio.timeout(timeout):
            streams = await asyncio.open_connection(host, port, ssl=context, server_hostname=host, limit=_PIECE)
            card = _RacsCard(seid, where, streams, answer_timeout)
            watch_peer(streams[1].get_extra_info("socket"), dead_peer_timeout)
            await card.power_on()
            is_powered = True
            return card
    except TimeoutError:
        raise CardGoneError(f"{where} does not answer within {timeout:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise CardGoneError(f"{where} has no certificate for that name: {error.verify_message}") from None
    except OSError as error:
        raise CardGoneError(f"{where} cannot be reached: {error.strerror or error}") from None
    finally:
        if card is not None and not is_powered:
            card.abort()
