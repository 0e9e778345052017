"""Which cards a RACS server has for us."""

from __future__ import annotations

import asyncio
import ssl
from typing import NamedTuple

from secfunet.racs.client import ClientConnection, Response
from secfunet.racs.commands import Command, GetVersion, ListCards
from secfunet.racs.errors import RacsError
from secfunet.racs.seids import decode_seids
from secfunet.racs.syntax import tokens_of

_PIECE = 65536


class ServerUnreachableError(RacsError):
    """The server cannot be reached, does not answer, or is not who it should be."""


class Inventory(NamedTuple):
    """What a server says of itself."""

    version: str
    seids: list[str]


async def ask_inventory(host: str, port: int, context: ssl.SSLContext, *, timeout: float) -> Inventory:
    """Asks the server within ``timeout`` seconds. Raises ServerUnreachableError, RacsRefusedError, RacsProtocolError."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host, limit=_PIECE)
            try:
                version, cards = (await _ask(reader, writer, [GetVersion(), ListCards()])).statuses
            finally:
                writer.transport.abort()
    except TimeoutError:
        raise ServerUnreachableError(f"{host}:{port} does not answer within {timeout:g} s") from None
    except OSError as error:
        raise ServerUnreachableError(f"{host}:{port} cannot be reached: {error.strerror or error}") from None
    return Inventory(version.text, decode_seids(tokens_of(cards.text)))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, commands: list[Command]) -> Response:
    protocol = ClientConnection()
    writer.write(protocol.send(commands, append=True))
    while True:
        response = protocol.receive(await reader.read(_PIECE))
        if response is not None:
            response.raise_failure()
            if len(response.statuses) != len(commands):
                raise RacsError("the server has left out a status")
            return response
