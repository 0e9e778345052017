"""TLS-Tandem against plain OpenSSL: the same clients and servers at the other end, in the same run.

Handshakes: ``openssl s_time`` (one connection at a time) against a listener whose handshakes run in a secure element's process, and against
``openssl s_server`` with a key of the same kind; mutual authentication on both. Bulk: this process receives from ``openssl s_server``
over a TLS-Tandem connection, and over OpenSSL on a blocking socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from bench.plan import Plan
from bench.rows import Row
from secfunet.card import CardClient, KeyAlgorithm, SingleCard
from secfunet.tandem.aio import close_writer, open_tandem_connection, start_tandem_server
from secfunet.tandem.parameters import TandemParameters
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority
from tests.tandem.peers import Files, free_port, listening, program

NAMES = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
KINDS = (
    ("full, TLS 1.3", ("-tls1_3", "-new")),
    ("full, TLS 1.2", ("-tls1_2", "-new")),
    ("resumed, TLS 1.2", ("-tls1_2", "-reuse")),
)
CONNECTIONS = re.compile(rb"(\d+) connections in (\d+) real seconds")
RESUMED_13 = "resumed, TLS 1.3"
BULK_SHARE = 0.25
PIECE = 1 << 16


@dataclass(frozen=True)
class Bench:
    """Two cards of one CA, and files for the programs at the other end."""

    files: Files
    leaf: tuple[Path, Path]
    client: CardProcess
    server: CardProcess


async def measure(plan: Plan) -> None:
    """Handshakes a second, then bulk."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        authority = CertificateAuthority("Bench CA")
        files = Files(folder, authority, CertificateAuthority("nobody"))
        async with running_card(folder, name="client") as client, running_card(folder, name="server") as server:
            await personalise(client, authority, "client", algorithm=KeyAlgorithm.P_256, server=False)
            await personalise(server, authority, "server", algorithm=KeyAlgorithm.P_256, names=NAMES, client=False)
            bench = Bench(files, files.leaf("ec"), client, server)
            await _handshakes(plan, bench)
            await _bulk(plan, bench)


async def _handshakes(plan: Plan, bench: Bench) -> None:
    seconds = max(round(plan.seconds), 1)
    plain: dict[str, Row] = {}
    async with _openssl_server(bench, "-quiet") as port:
        for kind, options in KINDS:
            found = [await _s_time(bench, port, seconds, *options) for _ in range(plan.rounds)]
            plain[kind] = plan.add(Row.of(f"handshakes of openssl s_server, {kind}", "1/s", found))
    async with _pool(bench.server, "server") as pool:
        server = await start_tandem_server(_Sink, pool, host="127.0.0.1", port=0)
        async with server:
            port = int(server.sockets[0].getsockname()[1])
            for kind, options in KINDS:
                found = [await _s_time(bench, port, seconds, *options) for _ in range(plan.rounds)]
                row = Row.of(f"handshakes of TLS-Tandem, secure element as server, {kind}", "1/s", found)
                plan.add(row.against(plain[kind]))
    await _resumed(plan, bench)


async def _resumed(plan: Plan, bench: Bench) -> None:
    """Resumed handshakes of TLS 1.3. s_time does not read the tickets, which come after the handshake: so a client of our own does."""
    context = _client_context(bench)
    context.minimum_version = ssl.TLSVersion.TLSv1_3

    async def rounds(port: int) -> list[float]:
        return [await asyncio.to_thread(_resume, port, context, plan.seconds) for _ in range(plan.rounds)]

    async with _openssl_server(bench, "-rev") as port:
        plain = plan.add(Row.of(f"handshakes of openssl s_server, {RESUMED_13}", "1/s", await rounds(port)))
    async with _pool(bench.server, "server") as pool:
        server = await start_tandem_server(_Echo, pool, host="127.0.0.1", port=0)
        async with server:
            found = await rounds(int(server.sockets[0].getsockname()[1]))
    plan.add(Row.of(f"handshakes of TLS-Tandem, secure element as server, {RESUMED_13}", "1/s", found).against(plain))


def _resume(port: int, context: ssl.SSLContext, seconds: float) -> float:
    """Resumed connections a second, one after the other; each brings the ticket for the next."""
    session, done, begin = None, -1, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds or done < 1:
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost", session=session) as connection,
        ):
            if session is not None and not connection.session_reused:
                raise RuntimeError("the server did not resume the session")
            connection.sendall(b"x\n")
            connection.recv(16)  # the tickets come before it
            session = connection.session
        done += 1
        if not done:
            begin = time.perf_counter()  # the first one was a full handshake
    return done / passed


async def _bulk(plan: Plan, bench: Bench) -> None:
    (bench.files.folder / "bulk").write_bytes(bytes(plan.bulk_bytes))
    context = _client_context(bench)

    async with _openssl_server(bench, "-HTTP", cwd=bench.files.folder) as port, _pool(bench.client, "client") as pool:

        async def tandem(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await open_tandem_connection(
                pool, "127.0.0.1", port, server_name="localhost", parameters=TandemParameters(), timeout=20
            )

        found = [await asyncio.to_thread(_receive_plain, port, context, plan) for _ in range(plan.rounds)]
        plain = plan.add(Row.of("bulk received, plain OpenSSL", "MB/s", found))
        ours = Row.of(
            "bulk received, TLS-Tandem", "MB/s", [await _receive(port, tandem, plan) for _ in range(plan.rounds)]
        )
        plan.add(ours.against(plain).at_least(BULK_SHARE))


Opener = Callable[[int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def _receive(port: int, connect: Opener, plan: Plan) -> float:
    """MB (10^6 bytes) a second, without the handshake."""
    reader, writer = await connect(port)
    begin = time.perf_counter()
    writer.write(b"GET /bulk HTTP/1.0\r\n\r\n")
    received = 0
    while received < plan.bulk_bytes:
        piece = await reader.read(PIECE)
        if not piece:
            raise RuntimeError(f"the stream ended after {received} bytes")
        received += len(piece)
    passed = time.perf_counter() - begin
    with contextlib.suppress(ConnectionError, OSError):
        await close_writer(writer)
    return received / passed / 1e6


def _client_context(bench: Bench) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(bench.files.ca))
    context.load_cert_chain(*bench.leaf)
    return context


def _receive_plain(port: int, context: ssl.SSLContext, plan: Plan) -> float:
    """The same with OpenSSL on a blocking socket: nothing in Python but the call."""
    buffer = bytearray(PIECE)
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        begin = time.perf_counter()
        connection.sendall(b"GET /bulk HTTP/1.0\r\n\r\n")
        received = 0
        while received < plan.bulk_bytes:
            size = connection.recv_into(buffer)
            if not size:
                raise RuntimeError(f"the stream ended after {received} bytes")
            received += size
        return received / (time.perf_counter() - begin) / 1e6


@contextlib.asynccontextmanager
async def _openssl_server(bench: Bench, *options: str, cwd: Path | None = None) -> AsyncIterator[int]:
    """``openssl s_server`` that demands a client certificate, as a card does."""
    certificate, key = bench.leaf
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(certificate), "-key", str(key)),
        *("-Verify", "2", "-verify_return_error", "-CAfile", str(bench.files.ca), *options),
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await listening(port)
        yield port
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def _pool(card: CardProcess, identity: str) -> AsyncIterator[SingleCard]:
    async def connect() -> CardClient:
        return await card.connect(identity)

    pool = SingleCard(connect)
    try:
        yield pool
    finally:
        await pool.close()


async def _s_time(bench: Bench, port: int, seconds: int, *options: str) -> float:
    certificate, key = bench.leaf
    command = ("openssl", "s_time", "-connect", f"127.0.0.1:{port}", "-time", seconds, "-CAfile", bench.files.ca)
    async with program(*command, "-cert", certificate, "-key", key, *options) as process:
        output, _ = await process.communicate()
    found = CONNECTIONS.search(output)
    if found is None or not int(found[1]):
        raise RuntimeError(f"openssl s_time measured nothing: {output.decode(errors='replace')[-300:]}")
    return int(found[1]) / int(found[2])


class _Sink(asyncio.Protocol):
    """Takes whatever comes."""


class _Echo(asyncio.Protocol):
    """Gives back whatever comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if isinstance(self._transport, asyncio.Transport):
            self._transport.write(data)
