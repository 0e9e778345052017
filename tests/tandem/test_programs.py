"""TLS-Tandem against nginx and curl, with aiohttp's server over it, and gRPC through the relay."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from secfunet.tandem.aio import close_writer, open_tandem_connection, start_tandem_server
from secfunet.tandem.errors import RelayError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tandem.relay import start_relay
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from tests.tandem.conftest import Pools
from tests.tandem.peers import Files, free_port, listening, program
from tests.tandem.test_both_ends import VERSIONS, only, port_of

pytestmark = pytest.mark.interop
BULK = 100 << 20


# ---- nginx: we are the client


@contextlib.asynccontextmanager
async def nginx(files: Files, folder: Path, protocol: str, kind: str) -> AsyncIterator[int]:
    """An nginx of our own, in the foreground, with its own folder; it demands a client certificate."""
    certificate, key = files.leaf(kind)
    port = free_port()
    config = folder / "nginx.conf"
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"""daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{ access_log off; {temporary}
          server {{
            listen 127.0.0.1:{port} ssl; root {folder};
            ssl_certificate {certificate}; ssl_certificate_key {key}; ssl_protocols {protocol};
            ssl_client_certificate {files.ca}; ssl_verify_client on;
            ssl_session_cache shared:test:1m;
            location /who {{ default_type text/plain; return 200 "$ssl_client_s_dn $ssl_session_reused"; }}
          }}
        }}"""
    )
    async with program("/usr/sbin/nginx", "-p", folder, "-c", config, "-e", folder / "error.log"):
        await listening(port)
        yield port


async def get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> bytes:
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1])
    return await reader.readexactly(length)


@pytest.mark.parametrize(("protocol", "version"), [("TLSv1.2", TLS_1_2), ("TLSv1.3", TLS_1_3)])
@pytest.mark.parametrize("kind", ["rsa", "ec"])
async def test_nginx_full_resumed_and_a_large_file(
    pools: Pools, files: Files, tmp_path: Path, protocol: str, version: int, kind: str
) -> None:
    content = hashlib.shake_128(b"file").digest(5 << 20)
    (tmp_path / "large").write_bytes(content)
    async with nginx(files, tmp_path, protocol, kind) as port:
        seen = []
        for _ in range(3):
            reader, writer = await open_tandem_connection(
                pools.client(kind), "127.0.0.1", port, server_name="localhost", timeout=10, limit=1 << 20
            )
            assert writer.get_extra_info("tls_version") == version
            seen.append(await get(reader, writer, "/who"))
            await asyncio.sleep(0.05)
            assert await get(reader, writer, "/large") == content
            await close_writer(writer)
        assert seen == [b"CN=client-" + kind.encode() + b" " + mark for mark in (b".", b"r", b"r")]


# ---- aiohttp over us, curl at the other end


@contextlib.asynccontextmanager
async def site(pools: Pools, kind: str = "ec", parameters: TandemParameters | None = None) -> AsyncIterator[int]:
    """aiohttp's server over TLS-Tandem: it says who calls, takes uploads and gives downloads."""

    async def who(request: web.Request) -> web.Response:
        assert request.transport is not None
        certificate = request.transport.get_extra_info("peercert")
        return web.Response(text=hashlib.sha256(certificate).hexdigest())

    async def upload(request: web.Request) -> web.Response:
        digest = hashlib.blake2b()
        async for piece in request.content.iter_any():
            digest.update(piece)
        return web.Response(text=digest.hexdigest())

    async def download(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(BULK)})
        await response.prepare(request)
        piece = hashlib.shake_128(b"bulk").digest(1 << 20)
        for _ in range(BULK >> 20):
            await response.write(piece)
        return response

    app = web.Application(client_max_size=2 * BULK)
    app.add_routes([web.get("/who", who), web.post("/upload", upload), web.get("/download", download)])
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    server = await start_tandem_server(
        runner.server, pools.server(kind), host="127.0.0.1", parameters=parameters or TandemParameters()
    )
    try:
        yield port_of(server)
    finally:
        server.close()
        await runner.cleanup()
        server.close_connections()
        await server.wait_closed()


async def curl(files: Files, port: int, path: str, *options: object) -> bytes:
    certificate, key = files.leaf(server=False)
    url = f"https://localhost:{port}{path}"
    own = ("--cert", certificate, "--key", key, "--cacert", files.ca, "--fail", "--silent", "--show-error")
    async with program("curl", *own, *options, url) as process:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, output
        return output


@pytest.mark.parametrize("option", ["--tls-max=1.2", "--tlsv1.3"])
@pytest.mark.parametrize("kind", ["rsa", "ec"])
async def test_curl_asks_aiohttp_which_sees_its_certificate(pools: Pools, files: Files, option: str, kind: str) -> None:
    options = ("--tls-max", "1.2") if option == "--tls-max=1.2" else (option,)
    async with site(pools, kind) as port:
        answer = await curl(files, port, "/who", *options)
        der = ssl.PEM_cert_to_DER_cert((files.folder / "leaf.pem").read_text())
        assert answer.decode() == hashlib.sha256(der).hexdigest()


@pytest.mark.parametrize("option", ["--tls-max=1.2", "--tlsv1.3"])
async def test_curl_moves_a_hundred_megabytes_each_way(pools: Pools, files: Files, tmp_path: Path, option: str) -> None:
    options = ("--tls-max", "1.2") if option == "--tls-max=1.2" else (option,)
    data = tmp_path / "data"
    piece = hashlib.shake_128(b"bulk").digest(1 << 20)
    digest = hashlib.blake2b()
    with data.open("wb") as file:
        for _ in range(BULK >> 20):
            file.write(piece)
            digest.update(piece)
    async with site(pools) as port:
        assert (
            await curl(files, port, "/upload", *options, "--data-binary", f"@{data}")
        ).decode() == digest.hexdigest()
        await curl(files, port, "/download", *options, "--output", tmp_path / "copy")
    copied = hashlib.blake2b()
    with (tmp_path / "copy").open("rb") as file:
        while block := file.read(1 << 20):
            copied.update(block)
    assert copied.digest() == digest.digest()


async def test_a_site_over_tandem_asked_with_a_card(pools: Pools) -> None:
    async with site(pools) as port:
        reader, writer = await open_tandem_connection(
            pools.client(), "127.0.0.1", port, server_name="localhost", timeout=10
        )
        answer = await get(reader, writer, "/who")
        assert answer.decode() == hashlib.sha256(pools.cards.certificates["client-ec"]).hexdigest()
        await close_writer(writer)


# ---- gRPC through the relay


class Who(health.aio.HealthServicer):
    """Health, and a word about the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[dict[str, list[bytes]]] = []

    async def Check(self, request, context):  # noqa: N802 - gRPC's name
        self.callers.append(context.auth_context())
        return await super().Check(request, context)


@contextlib.asynccontextmanager
async def grpc_server(files: Files, kind: str) -> AsyncIterator[tuple[int, Who, grpc.aio.Server]]:
    certificate, key = files.leaf(kind)
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())], files.ca.read_bytes(), require_client_auth=True
    )
    server = grpc.aio.server()
    servicer = Who()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port, servicer, server
    finally:
        await server.stop(None)


@VERSIONS
@pytest.mark.parametrize("kind", ["rsa", "ec"])
async def test_grpc_through_the_relay(pools: Pools, files: Files, tmp_path: Path, version: int, kind: str) -> None:
    parameters = only(version, alpn=("h2",))
    infos: list[tuple[object, object]] = []
    async with grpc_server(files, kind) as (port, servicer, _):

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await open_tandem_connection(
                pools.client(kind), "127.0.0.1", port, server_name="localhost", parameters=parameters, timeout=10
            )
            infos.append((writer.get_extra_info("alpn"), writer.get_extra_info("tls_version")))
            return reader, writer

        for _ in range(2):  # the second time with the session of the first
            async with (
                await start_relay(tmp_path / "relay", connect) as relay,
                # Without a pool of its own the second channel may be given the first one's dying connection: they have one address.
                grpc.aio.insecure_channel(relay.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel,
            ):
                stub = health_pb2_grpc.HealthStub(channel)
                for _ in range(50):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
                watch.cancel()
        assert infos == [("h2", version)] * 2
    pem = ssl.DER_cert_to_PEM_cert(pools.cards.certificates[f"client-{kind}"]).encode()
    assert {caller["x509_pem_cert"][0].strip() for caller in servicer.callers} == {pem.strip()}
    assert len(servicer.callers) == 100


async def test_grpc_sees_a_server_that_goes_away_and_comes_back(pools: Pools, files: Files, tmp_path: Path) -> None:
    where: list[int] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await open_tandem_connection(
            pools.client(),
            "127.0.0.1",
            where[-1],
            server_name="localhost",
            parameters=TandemParameters(alpn=("h2",)),
            timeout=5,
        )

    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
    async with (
        await start_relay(tmp_path / "relay", connect) as relay,
        grpc.aio.insecure_channel(relay.target, options=options) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        async with grpc_server(files, "ec") as (port, _, _):
            where.append(port)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert relay.last_error is not None
        async with grpc_server(files, "ec") as (port, _, _):
            where.append(port)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that others may enter, unlike pytest's own."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


async def test_the_relay_is_for_this_process_alone(tmp_path: Path, open_folder: Path) -> None:
    calls = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        calls.append(1)
        raise AssertionError("nobody may get this far")

    with pytest.raises(RelayError, match="0700"):
        await start_relay(open_folder / "relay", connect)
    async with await start_relay(tmp_path / "relay", connect) as relay:
        # The same user, another process.
        code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 'relay')!r}); print(s.recv(9))"
        async with program("python3", "-c", code) as process:
            output, _ = await process.communicate()
        assert b"reset" in output or output == b"b''\n"
        assert isinstance(relay.last_error, RelayError)
    assert not calls
    assert not (tmp_path / "relay").exists()


@contextlib.asynccontextmanager
async def plain_grpc_server(servicer: Who, address: str) -> AsyncIterator[None]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kind", ["rsa", "ec"])
async def test_a_grpc_client_that_joins_its_flight_and_talks_at_once(
    pools: Pools, files: Files, tmp_path: Path, kind: str
) -> None:
    """BoringSSL puts certificate, verify and Finished in one record, and HTTP/2's preface right behind."""
    servicer = Who()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        local_reader, local_writer = await asyncio.open_unix_connection(tmp_path / "plain")

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while piece := await source.read(65536):
                    sink.write(piece)
            sink.close()

        await asyncio.gather(pump(reader, local_writer), pump(local_reader, writer))

    def factory() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), carry)

    certificate, key = files.leaf(kind, server=False)
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes(), key.read_bytes(), certificate.read_bytes())
    async with (
        plain_grpc_server(servicer, f"unix:{tmp_path}/plain"),
        await start_tandem_server(
            factory, pools.server(kind), host="127.0.0.1", parameters=TandemParameters(alpn=("h2",))
        ) as listener,
    ):
        for _ in range(5):
            # A pool of its own for each channel: otherwise gRPC shares the connection.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(f"localhost:{port_of(listener)}", credentials, options) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                for _ in range(5):
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert (listener.handshakes_done, listener.handshakes_failed) == (5, 0)
        listener.close_connections()
    assert len(servicer.callers) == 25
