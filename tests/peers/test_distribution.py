"""TLS programs as they come from the distribution: GnuTLS, NSS, and lighttpd with mbedTLS, wolfSSL and GnuTLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secfunet.tandem.aio import close_writer, open_tandem_connection
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from tests.peers.stacks import NAMES, SIZE, Identity, build, listening_at
from tests.peers.test_stacks import in_full_and_twice_resumed, listener
from tests.tandem.conftest import Pools
from tests.tandem.peers import Files, free_port, program
from tests.tandem.test_both_ends import only

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

VERSIONS = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=NAMES.get)
GNUTLS = {TLS_1_2: "NORMAL:-VERS-ALL:+VERS-TLS1.2", TLS_1_3: "NORMAL:-VERS-ALL:+VERS-TLS1.3"}
LINE = 1 << 14
LINES = b"".join(base64.b64encode(hashlib.sha512(bytes((n % 251,))).digest()) + b"\n" for n in range(12000))[:SIZE]


# ---- GnuTLS


@VERSIONS
async def test_gnutls_serv(pools: Pools, files: Files, version: int) -> None:
    """It echoes a line at a time."""
    name, port = f"gnutls-{version:x}.test", free_port()
    identity = Identity.of(files, name)
    own = ("--x509certfile", identity.certificate, "--x509keyfile", identity.key, "--x509cafile", identity.authority)
    options = ("--echo", "--quiet", "--priority", GNUTLS[version], "--require-client-cert", "--verify-client-cert")
    # It writes down whatever it gets, which nobody reads here.
    async with program("sh", "-c", 'exec "$@" >/dev/null 2>&1', "sh", "gnutls-serv", "--port", port, *own, *options):
        await listening_at(port)

        async def connect() -> bool:
            reader, writer = await open_tandem_connection(
                pools.client("ec"), "127.0.0.1", port, server_name=name, parameters=only(version), timeout=30
            )
            for number in range(SIZE // LINE):
                line = bytes((ord("a") + number % 26,)) * (LINE - 1) + b"\n"
                writer.write(line)
                assert await asyncio.wait_for(reader.readexactly(LINE), 20) == line
            await close_writer(writer)
            return bool(writer.get_extra_info("resumed"))

        await in_full_and_twice_resumed(connect)


@VERSIONS
async def test_gnutls_cli(pools: Pools, files: Files, version: int) -> None:
    identity = Identity.of(files, "client")
    async with listener(pools, version) as (port, ends):
        own = (
            "--x509certfile",
            identity.certificate,
            "--x509keyfile",
            identity.key,
            "--x509cafile",
            identity.authority,
        )
        names = ("--sni-hostname", "localhost", "--verify-hostname", "localhost")
        arguments = ("--port", port, *own, *names, "--priority", GNUTLS[version], "--resume", "127.0.0.1")
        async with program("gnutls-cli", *arguments) as process:
            output, _ = await asyncio.wait_for(process.communicate(LINES), 60)
        assert process.returncode == 0, output[-2000:]
        assert b"*** This is a resumed session" in output
        assert LINES in output
        await asyncio.sleep(0.1)
    assert ends == [None] * 2


# ---- NSS


async def database(folder: Path, identity: Identity) -> str:
    """An NSS database with the certificate "own" and the authority."""
    where = f"sql:{folder}"
    await build("certutil", "-N", "-d", where, "--empty-password")
    await build("certutil", "-A", "-d", where, "-n", "authority", "-t", "CT,C,C", "-a", "-i", identity.authority)
    await build("pk12util", "-i", identity.pkcs12, "-d", where, "-W", "password")
    return where


@pytest.mark.peers
@VERSIONS
async def test_nss_selfserv(pools: Pools, files: Files, tmp_path: Path, version: int) -> None:
    """It answers a request, takes no more than that, and sends no more than a few lines."""
    name, port = f"nss-{version:x}.test", free_port()
    where = await database(tmp_path, Identity.of(files, name))
    versions = NAMES[version].lower().replace("v", "")
    async with program(
        *("selfserv", "-d", where, "-n", "own", "-p", port, "-V", f"{versions}:{versions}", "-r", "-r", "-u")
    ) as process:
        await listening_at(port)

        async def connect() -> bool:
            reader, writer = await open_tandem_connection(
                pools.client("ec"), "127.0.0.1", port, server_name=name, parameters=only(version), timeout=30
            )
            writer.write(b"GET /large HTTP/1.0\r\n\r\n")
            got = await asyncio.wait_for(reader.read(), 20)
            assert got.startswith(b"HTTP/1.0 200"), got
            await close_writer(writer)
            return bool(writer.get_extra_info("resumed"))

        await in_full_and_twice_resumed(connect)
        assert process.returncode is None


@pytest.mark.peers
@VERSIONS
async def test_nss_tstclnt(pools: Pools, files: Files, tmp_path: Path, version: int) -> None:
    """It does not end when its input does: here it is ended when it has all of it back."""
    where = await database(tmp_path, Identity.of(files, "client"))
    versions = NAMES[version].lower().replace("v", "")
    async with listener(pools, version) as (port, _):
        arguments = (
            "-d",
            where,
            "-n",
            "own",
            "-h",
            "localhost",
            "-4",
            "-p",
            port,
            "-V",
            f"{versions}:{versions}",
            "-u",
        )
        async with program("tstclnt", *arguments, stderr=asyncio.subprocess.DEVNULL) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(LINES)
            assert await asyncio.wait_for(process.stdout.readexactly(SIZE), 30) == LINES


# ---- lighttpd


@contextlib.asynccontextmanager
async def lighttpd(files: Files, folder: Path, module: str, version: int, name: str) -> AsyncIterator[int]:
    """A lighttpd of our own, in the foreground, with its own folder; it demands a client certificate, and echoes by a CGI script."""
    identity, port = Identity.of(files, name), free_port()
    (folder / "echo.sh").write_text("printf 'Content-Type: application/octet-stream\\r\\n\\r\\n'; exec cat\n")
    protocol = NAMES[version]
    config = folder / "lighttpd.conf"
    config.write_text(
        f"""server.modules = ("mod_{module}", "mod_cgi")
        server.document-root = "{folder}"
        server.bind = "127.0.0.1"
        server.port = {port}
        server.upload-dirs = ("{folder}")
        server.errorlog = "{folder}/error.log"
        cgi.assign = (".sh" => "/bin/sh")
        ssl.engine = "enable"
        ssl.pemfile = "{identity.certificate}"
        ssl.privkey = "{identity.key}"
        ssl.ca-file = "{identity.authority}"
        ssl.verifyclient.activate = "enable"
        ssl.verifyclient.enforce = "enable"
        ssl.openssl.ssl-conf-cmd = ("MinProtocol" => "{protocol}", "MaxProtocol" => "{protocol}")
        """
    )
    async with program("lighttpd", "-D", "-f", config):
        await listening_at(port)
        yield port


@pytest.mark.peers
@pytest.mark.parametrize(
    ("module", "version"),
    [("mbedtls", TLS_1_2), *((module, version) for module in ("wolfssl", "gnutls") for version in (TLS_1_2, TLS_1_3))],
)
async def test_lighttpd(pools: Pools, files: Files, tmp_path: Path, module: str, version: int) -> None:
    name = f"{module}-{version:x}.test"
    content = os.urandom(SIZE)
    async with lighttpd(files, tmp_path, module, version, name) as port:
        resumed = []
        for _ in range(3):
            reader, writer = await open_tandem_connection(
                pools.client("ec"), "127.0.0.1", port, server_name=name, parameters=only(version), timeout=30
            )
            head = f"POST /echo.sh HTTP/1.1\r\nHost: {name}\r\nContent-Length: {SIZE}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + content)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            body = await asyncio.wait_for(reader.read(), 60)
            assert content == (unchunked(body) if b"chunked" in answer.lower() else body)
            resumed.append(writer.get_extra_info("resumed"))
            await close_writer(writer)
    # It closes at once behind its answer: whether the card has its ticket by then is chance.
    assert resumed[0] is False


def unchunked(body: bytes) -> bytes:
    got, at = b"", 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if not size:
            return got
        got += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
