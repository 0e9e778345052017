"""Programs that nobody here wrote, as peers: files for them, ports, and processes that end with the test."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.pki import CertificateAuthority, PrivateKey, key_pem

LOCAL_NAMES = ("localhost", "127.0.0.1")


@dataclass
class Files:
    """Writes PEM files into ``folder``."""

    folder: Path
    authority: CertificateAuthority
    foreign: CertificateAuthority

    @property
    def ca(self) -> Path:
        """The authority that the cards trust."""
        path = self.folder / "ca.pem"
        path.write_bytes(self.authority.pem)
        return path

    def leaf(
        self,
        kind: str = "ec",
        *,
        names: tuple[str, ...] = LOCAL_NAMES,
        expired: bool = False,
        is_foreign: bool = False,
        client: bool = True,
        server: bool = True,
    ) -> tuple[Path, Path]:
        """A certificate and its key; return the paths."""
        key: PrivateKey = (
            rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
        )
        certificate = (self.foreign if is_foreign else self.authority).issue(
            key.public_key(),
            f"{kind} leaf",
            names=[_general_name(name) for name in names],
            client=client,
            server=server,
            not_before=timedelta(hours=-2) if expired else timedelta(hours=-1),
            not_after=timedelta(hours=-1) if expired else timedelta(days=1),
        )
        certificate_path, key_path = self.folder / "leaf.pem", self.folder / "leaf.key"
        certificate_path.write_bytes(certificate.public_bytes(Encoding.PEM))
        key_path.write_bytes(key_pem(key))
        return certificate_path, key_path


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def program(
    *arguments: object, stderr: int = asyncio.subprocess.STDOUT
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with pipes, ended at the end."""
    process = await asyncio.create_subprocess_exec(
        *(str(argument) for argument in arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def listening(port: int, *, seconds: float = 10.0) -> None:
    """Wait until somebody listens at a loopback port, without connecting (s_server serves one at a time)."""
    wanted = f"0100007F:{port:04X}"
    async with asyncio.timeout(seconds):
        while True:
            lines = Path("/proc/net/tcp").read_text().splitlines()  # noqa: ASYNC240 - procfs does not block
            if any(fields[1] == wanted and fields[3] == "0A" for fields in map(str.split, lines[1:])):
                return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def s_server(
    files: Files, *options: object, kind: str = "ec", verify: bool = True, **leaf: object
) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """``openssl s_server`` at a loopback port; it demands a client certificate of our authority."""
    certificate, key = files.leaf(kind, **leaf)  # type: ignore[arg-type]  # passed on
    port = free_port()
    demand = ("-Verify", "2", "-verify_return_error", "-CAfile", files.ca) if verify else ()
    accept = ("-accept", f"127.0.0.1:{port}", "-cert", certificate, "-key", key)
    # With -quiet the output is the peer's data and nothing else.
    stderr = asyncio.subprocess.DEVNULL if "-quiet" in options else asyncio.subprocess.STDOUT
    async with program("openssl", "s_server", *accept, *demand, *options, stderr=stderr) as process:
        await listening(port)
        yield port, process


async def read_until(stream: asyncio.StreamReader, wanted: bytes, *, seconds: float = 10.0) -> bytes:
    """Read until ``wanted`` has come; return everything."""
    got = b""
    async with asyncio.timeout(seconds):
        while wanted not in got:
            piece = await stream.read(65536)
            if not piece:
                raise AssertionError(f"{wanted!r} never came: {got.decode(errors='replace')}")
            got += piece
    return got
