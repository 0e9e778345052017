"""The port against servers that do not keep to the protocol; none of them has a card."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gose.authority.certificate_authority import CertificateAuthority
from gose.racs.tls import server_side
from secfunet.card.errors import CardGoneError
from secfunet.identity import der_of, pem_of
from secfunet.racs.card import connect_racs
from tests.gose_racs.node import TestNode

SELECT = bytes.fromhex("00A40400")


@pytest.mark.parametrize(
    ("statuses", "answered"),
    [
        pytest.param("+006 001 9000\r\n+006 002 9000\r\n", 2, id="a status left out at the end"),
        pytest.param("+006 002 9000\r\n+006 003 9000\r\n", 0, id="a status left out at the beginning"),
        pytest.param("+006 001 9000\r\n-906 002 no\r\n", 1, id="an error in the middle"),
        pytest.param("+006 001 nothing\r\n", 0, id="no response"),
        pytest.param("+006 001 9000\r\n+006 001 9000\r\n+006 001 9000\r\n", 0, id="one line thrice"),
        pytest.param("HELLO\r\n", 0, id="another protocol"),
    ],
)
async def test_a_server_that_lies_is_left(tmp_path: Path, statuses: str, answered: int) -> None:
    """What was done and not answered is not sent again: the connection ends."""
    ca = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP256R1()), now=time.time())
    node = TestNode(tmp_path, ca, {})
    node.authority.write_bytes(pem_of(der_of(ca.certificate)))
    asked = []

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                request = (await reader.readuntil(b"\r\nEND\r\n")).decode()
                asked.append(request)
                identifier = request.split()[1]
                said = "+008 001 on\r\n" if "POWERON" in request else statuses
                writer.write(f"BEGIN {identifier}\r\n{said}END\r\n".encode())
        writer.close()

    server = await asyncio.start_server(lie, "127.0.0.1", ssl=server_side(*node.credentials("node-b"), node.authority))
    async with server:
        port = await connect_racs(
            "localhost", server.sockets[0].getsockname()[1], "b-1", node.context("grid-a"), timeout=10
        )
        if answered:
            assert await port.transmit_many([SELECT] * 3) == [b"\x90\x00"] * answered
        else:
            with pytest.raises(CardGoneError):
                await port.transmit_many([SELECT] * 3)
        with pytest.raises(CardGoneError):
            await port.transmit(SELECT)
        assert len(asked) == 2
        await port.close()
