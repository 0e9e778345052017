"""TLS-Tandem against ``openssl s_server`` and ``openssl s_client``."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secfunet.tandem.aio import close_writer, open_tandem_connection, start_tandem_server
from secfunet.tandem.errors import HandshakeRefusedError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secfunet.tls.errors import PeerAlertError, ServerNameError, TruncatedStreamError
from tests.tandem.conftest import Pools
from tests.tandem.peers import Files, program, read_until, s_server
from tests.tandem.test_both_ends import VERSIONS, Echo, only, port_of, read_all

pytestmark = pytest.mark.interop
FLAG = {TLS_1_2: "-tls1_2", TLS_1_3: "-tls1_3"}
LEGACY = {
    "AES128-SHA": 0x002F,
    "AES256-SHA256": 0x003D,
    "ECDHE-RSA-AES256-SHA384": 0xC028,
    "ECDHE-RSA-AES128-SHA": 0xC013,
    "AES128-GCM-SHA256": 0x009C,
}


async def connect(pools: Pools, port: int, parameters: TandemParameters, *, kind: str = "ec", name: str = "localhost"):
    return await open_tandem_connection(
        pools.client(kind), "127.0.0.1", port, server_name=name, parameters=parameters, timeout=10
    )


# ---- we are the client


@VERSIONS
@pytest.mark.parametrize("server", ["rsa", "ec"])
@pytest.mark.parametrize("client", ["rsa", "ec"])
async def test_client_full_and_resumed(pools: Pools, files: Files, version: int, server: str, client: str) -> None:
    async with s_server(files, FLAG[version], "-rev", kind=server) as (port, _):
        resumed = []
        for _ in range(3):
            reader, writer = await connect(pools, port, only(version), kind=client)
            writer.write(b"stressed\n")
            assert await reader.readline() == b"desserts\n"
            resumed.append(writer.get_extra_info("resumed"))
            await close_writer(writer)
    assert resumed == [False, True, True]


@pytest.mark.parametrize("options", [("-no_ticket",), ("-no_cache",), ("-num_tickets", "0")], ids=lambda o: o[0])
@VERSIONS
async def test_client_with_other_session_habits(
    pools: Pools, files: Files, version: int, options: tuple[str, ...]
) -> None:
    async with s_server(files, FLAG[version], "-rev", *options) as (port, _):
        for _ in range(2):
            reader, writer = await connect(pools, port, only(version))
            writer.write(b"drawer\n")
            assert await reader.readline() == b"reward\n"
            await close_writer(writer)


@pytest.mark.parametrize("etm", [True, False], ids=["etm", "mte"])
@pytest.mark.parametrize("name", LEGACY)
async def test_client_with_legacy_suites(pools: Pools, files: Files, name: str, etm: bool) -> None:
    parameters = only(TLS_1_2, suites=(LEGACY[name],), allow_legacy=True)
    options = ("-tls1_2", "-rev", "-cipher", f"{name}:@SECLEVEL=0", *(() if etm else ("-no_etm",)))
    async with s_server(files, *options, kind="rsa") as (port, _):
        reader, writer = await connect(pools, port, parameters)
        for length in (1, 15, 16, 31, 4000):
            line = b"x" * length + b"y\n"
            writer.write(line)
            assert await reader.readline() == b"y" + b"x" * length + b"\n"
        if "GCM" not in name:
            assert writer.get_extra_info("cipher").find("CBC") > 0
        await close_writer(writer)


async def test_client_after_a_hello_retry_request(pools: Pools, files: Files) -> None:
    parameters = only(TLS_1_3, groups=(0x001D, 0x0017))  # X25519 first, which the server does not take
    async with s_server(files, "-tls1_3", "-rev", "-groups", "P-256") as (port, _):
        reader, writer = await connect(pools, port, parameters)
        writer.write(b"live\n")
        assert await reader.readline() == b"evil\n"
        await close_writer(writer)


@VERSIONS
async def test_client_with_a_server_that_fragments(pools: Pools, files: Files, version: int) -> None:
    async with s_server(files, FLAG[version], "-rev", "-max_send_frag", "512", "-split_send_frag", "512") as (port, _):
        reader, writer = await connect(pools, port, only(version))
        line = b"a" * 10_000
        writer.write(line + b"b\n")
        assert await reader.readline() == b"b" + line + b"\n"
        await close_writer(writer)


@VERSIONS
@pytest.mark.parametrize(
    ("leaf", "error"),
    [
        ({"is_foreign": True}, HandshakeRefusedError),
        ({"expired": True}, HandshakeRefusedError),
        ({"server": False}, HandshakeRefusedError),
        ({"names": ("elsewhere.example",)}, ServerNameError),
    ],
    ids=["foreign", "expired", "client-only", "other-name"],
)
async def test_client_refuses_a_wrong_server(
    pools: Pools, files: Files, version: int, leaf: dict[str, object], error: type[Exception]
) -> None:
    async with s_server(files, FLAG[version], "-rev", **leaf) as (port, _):
        with pytest.raises(error):
            await connect(pools, port, only(version))


@VERSIONS
async def test_client_is_refused_as_foreign(pools: Pools, files: Files, version: int) -> None:
    async with s_server(files, FLAG[version], "-rev") as (port, _):
        with pytest.raises(PeerAlertError, match="unknown_ca"):
            await read_all(pools.client("foreign"), port, only(version))


@VERSIONS
async def test_a_killed_server_is_a_truncated_stream(pools: Pools, files: Files, version: int) -> None:
    async with s_server(files, FLAG[version], "-quiet") as (port, process):
        reader, writer = await connect(pools, port, only(version))
        assert process.stdin is not None
        process.stdin.write(b"the first half")
        await process.stdin.drain()
        assert await reader.readexactly(14) == b"the first half"
        process.kill()
        with pytest.raises((TruncatedStreamError, ConnectionResetError)):
            await reader.read()
        await close_writer(writer)


async def test_key_updates_of_both_sides(pools: Pools, files: Files) -> None:
    async with s_server(files, "-tls1_3") as (port, process):
        reader, writer = await connect(pools, port, only(TLS_1_3))
        assert process.stdin is not None
        assert process.stdout is not None
        stream = writer.transport.core.stream  # type: ignore[attr-defined]
        for index, command in enumerate((b"k\n", b"K\n"), 1):  # K: asks us to change ours as well
            process.stdin.write(command)
            await process.stdin.drain()
            await asyncio.sleep(0.2)  # a command stands at the start of what s_server reads at once
            process.stdin.write(b"after the server's update\n")
            await process.stdin.drain()
            assert await reader.readline() == b"after the server's update\n"
            assert stream.key_updates_received == index
            writer.write(b"and ours\n")
            await read_until(process.stdout, b"and ours")
        assert stream.key_updates_sent == 1
        writer.transport.update_key(request_peer=True)  # type: ignore[attr-defined]
        writer.write(b"asked for one\n")
        await read_until(process.stdout, b"asked for one")
        process.stdin.write(b"here it is\n")
        await process.stdin.drain()
        assert await reader.readline() == b"here it is\n"
        assert (stream.key_updates_sent, stream.key_updates_received) == (2, 3)
        await close_writer(writer)


async def test_renegotiation_is_refused(pools: Pools, files: Files) -> None:
    async with s_server(files, "-tls1_2", "-legacy_renegotiation") as (port, process):
        _, writer = await connect(pools, port, only(TLS_1_2))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"r\n")  # HelloRequest
        await process.stdin.drain()
        # openssl takes the refusal as the end, and says so.
        await read_until(process.stdout, b"no renegotiation")
        await close_writer(writer)


# ---- we are the server


@VERSIONS
@pytest.mark.parametrize("server", ["rsa", "ec"])
@pytest.mark.parametrize("client", ["rsa", "ec"])
async def test_server_full_and_resumed(
    pools: Pools, files: Files, tmp_path: Path, version: int, server: str, client: str
) -> None:
    certificate, key = files.leaf(client, server=False)
    session = tmp_path / "session.pem"
    options = ("-cert", certificate, "-key", key, "-CAfile", files.ca, "-verify_return_error", FLAG[version])
    async with await start_tandem_server(
        Echo, pools.server(server), host="127.0.0.1", parameters=only(version)
    ) as listener:
        for reuse in (False, True, True):
            arguments = ("-sess_in", session) if reuse else ()
            target = ("-connect", f"127.0.0.1:{port_of(listener)}", "-servername", "localhost", "-sess_out", session)
            async with program("openssl", "s_client", *target, *options, *arguments) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(b"hello\n")
                await process.stdin.drain()
                output = await read_until(process.stdout, b"HELLO")
                assert (b"Reused, TLSv1" in output) == reuse
                assert b"Verify return code: 0 (ok)" in output
                process.stdin.write(b"Q\n")
                await process.stdin.drain()
                await asyncio.wait_for(process.wait(), 5)
        assert (listener.handshakes_done, listener.handshakes_failed) == (3, 0)


@VERSIONS
@pytest.mark.parametrize("leaf", [{"is_foreign": True}, {"expired": True}, {"client": False}, None])
async def test_server_refuses_a_wrong_client(
    pools: Pools, files: Files, version: int, leaf: dict[str, object] | None
) -> None:
    def never() -> Echo:
        raise AssertionError("a protocol was made for a client that must be refused")

    own: tuple[object, ...] = ()
    if leaf is not None:
        certificate, key = files.leaf(**leaf)  # type: ignore[arg-type]
        own = ("-cert", certificate, "-key", key)
    async with await start_tandem_server(never, pools.server(), host="127.0.0.1", parameters=only(version)) as listener:
        target = ("-connect", f"127.0.0.1:{port_of(listener)}", FLAG[version])
        async with program("openssl", "s_client", *target, *own) as process:
            assert process.stdout is not None
            output = await asyncio.wait_for(process.stdout.read(), 10)
            await process.wait()
        assert b"alert" in output
        await asyncio.sleep(0.05)
        assert (listener.handshakes_done, listener.handshakes_failed) == (0, 1)


async def test_server_with_key_updates_of_the_client(pools: Pools, files: Files) -> None:
    certificate, key = files.leaf()
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as listener:
        target = ("-connect", f"127.0.0.1:{port_of(listener)}", "-cert", certificate, "-key", key)
        async with program("openssl", "s_client", *target) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for command, text in ((b"k\n", b"first"), (b"K\n", b"second"), (b"K\n", b"third")):
                process.stdin.write(command)
                await process.stdin.drain()
                await read_until(process.stdout, b"KEYUPDATE")
                process.stdin.write(text + b"\n")
                await process.stdin.drain()
                await read_until(process.stdout, text.upper())
            (connection,) = listener.connections
            assert connection.core.stream.key_updates_received == 3
            assert connection.core.stream.key_updates_sent == 2


async def test_server_refuses_renegotiation_by_the_client(pools: Pools, files: Files) -> None:
    certificate, key = files.leaf()
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", parameters=only(TLS_1_2)) as listener:
        target = ("-connect", f"127.0.0.1:{port_of(listener)}", "-cert", certificate, "-key", key)
        async with program("openssl", "s_client", *target, "-legacy_renegotiation") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"hello\n")
            await process.stdin.drain()
            await read_until(process.stdout, b"HELLO")
            process.stdin.write(b"R\n")
            await process.stdin.drain()
            await read_until(process.stdout, b"no renegotiation")


# ---- bulk

MEGABYTES = 100


async def pieces(count: int) -> AsyncIterator[bytes]:
    """``count`` MiB, no two alike."""
    base = hashlib.shake_128(b"bulk").digest(1 << 20)
    for index in range(count):
        yield index.to_bytes(8, "big") + base[8:]


@VERSIONS
async def test_a_hundred_megabytes_each_way(pools: Pools, files: Files, version: int) -> None:
    async with s_server(files, FLAG[version], "-quiet", kind="ec") as (port, process):
        assert process.stdin is not None
        assert process.stdout is not None
        reader, writer = await connect(pools, port, only(version))
        sent, received = hashlib.blake2b(), hashlib.blake2b()

        async def drain(source: asyncio.StreamReader) -> None:
            missing = MEGABYTES << 20
            while missing > 0:
                piece = await source.read(1 << 18)
                assert piece
                received.update(piece)
                missing -= len(piece)

        for sink, source in ((writer, process.stdout), (process.stdin, reader)):
            sent, received = hashlib.blake2b(), hashlib.blake2b()
            start = time.perf_counter()
            reading = asyncio.create_task(drain(source))
            async for piece in pieces(MEGABYTES):
                sent.update(piece)
                sink.write(piece)
                await sink.drain()
            await asyncio.wait_for(reading, 60)
            print(f"{MEGABYTES / (time.perf_counter() - start):.0f} MiB/s")  # noqa: T201 - shown with -s
            assert sent.digest() == received.digest()
        await close_writer(writer)
