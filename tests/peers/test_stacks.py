"""Foreign TLS stacks at the other end of TLS-Tandem: each role and version, in full and twice resumed, 1 MB each way, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from secfunet.tandem.aio import close_writer, open_tandem_connection, start_tandem_server
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from tests.peers.stacks import NAMES, SIZE, Identity, echo_client, echo_server, said
from tests.tandem.conftest import Pools
from tests.tandem.peers import Files
from tests.tandem.test_both_ends import only, port_of

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

VERSIONS = (TLS_1_2, TLS_1_3)
SLOW = pytest.mark.peers
CLIENTS = [
    *(pytest.param("node", version, id=f"node-{NAMES[version]}") for version in VERSIONS),
    *(
        pytest.param(stack, version, marks=SLOW, id=f"{stack}-{NAMES[version]}")
        for stack in ("go", "jsse")
        for version in VERSIONS
    ),
    pytest.param("mbedtls", TLS_1_2, marks=SLOW, id="mbedtls-TLSv1.2"),
]
SERVERS = [one for one in CLIENTS if one.values[0] != "mbedtls"]
CONTENT = hashlib.shake_128(b"1 MB").digest(SIZE)


class Echo(asyncio.Protocol):
    """Gives back what it gets, with flow control, and notes how each connection ended."""

    def __init__(self, ends: list[Exception | None]) -> None:
        self._ends = ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ends.append(exc)


@contextlib.asynccontextmanager
async def listener(pools: Pools, version: int) -> AsyncIterator[tuple[int, list[Exception | None]]]:
    """A port, and how the connections to it ended."""
    ends: list[Exception | None] = []
    async with await start_tandem_server(
        lambda: Echo(ends), pools.server("ec"), host="127.0.0.1", parameters=only(version)
    ) as server:
        yield port_of(server), ends


async def there_and_back(pools: Pools, port: int, version: int, name: str) -> bool:
    """1 MB each way and an orderly end with an echo server at the port; whether the session was resumed."""
    reader, writer = await open_tandem_connection(
        pools.client("ec"), "127.0.0.1", port, server_name=name, parameters=only(version), timeout=30
    )
    assert writer.get_extra_info("tls_version") == version

    async def send() -> None:
        for at in range(0, SIZE, 65536):
            writer.write(CONTENT[at : at + 65536])
            await writer.drain()

    sending = asyncio.create_task(send())
    got = await asyncio.wait_for(reader.readexactly(SIZE), 60)
    await sending
    assert got == CONTENT
    resumed = bool(writer.get_extra_info("resumed"))
    await asyncio.wait_for(close_writer(writer), 10)
    return resumed


async def in_full_and_twice_resumed(connect: Callable[[], Awaitable[bool]]) -> None:
    """Connects in full, and then until two connections were resumed: a ticket of TLS 1.3 that a busy server sends late is missed."""
    assert not await connect()
    resumed = [await connect(), await connect()]
    while sum(resumed) < 2 and len(resumed) < 8:
        resumed.append(await connect())
    assert sum(resumed) == 2, resumed


@pytest.mark.parametrize(("stack", "version"), SERVERS)
async def test_a_server(pools: Pools, files: Files, stack: str, version: int) -> None:
    name = f"{stack}-{version:x}.test"
    async with echo_server(stack, Identity.of(files, name), version, name) as (port, process):

        async def connect() -> bool:
            resumed = await there_and_back(pools, port, version, name)
            (report,) = await said(process, 1)
            assert (report.get("version"), report.get("bytes")) == (NAMES[version], SIZE), report
            return resumed

        await in_full_and_twice_resumed(connect)


@pytest.mark.parametrize(("stack", "version"), CLIENTS)
async def test_a_client(pools: Pools, files: Files, stack: str, version: int) -> None:
    async with listener(pools, version) as (port, ends):
        reports = await echo_client(stack, port, Identity.of(files, "client"), version, "localhost", 3)
        assert [(report.version, report.bytes) for report in reports] == [(NAMES[version], SIZE)] * 3
        await asyncio.sleep(0.1)
    assert ends == [None] * 3
    # Go resumes TLS 1.2 with tickets only, and a server card gives none in TLS 1.2.
    is_resumed = (stack, version) != ("go", TLS_1_2)
    assert [report.resumed for report in reports] == [False, is_resumed, is_resumed]
