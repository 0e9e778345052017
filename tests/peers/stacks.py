"""Foreign TLS stacks as programs: servers that echo, and clients that send, want it back, and say how it went.

``peer.*`` in ``programs/`` are small programs around a stack's library, all with the same arguments; a distribution's own programs have
theirs. Every client authenticates with a certificate of the test's authority, every server demands one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12

from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from tests.tandem.peers import Files, free_port, program

PROGRAMS = Path(__file__).parent / "programs"
BUILD = Path(__file__).parents[2] / ".build" / "peers"
NAMES = {TLS_1_2: "TLSv1.2", TLS_1_3: "TLSv1.3"}
SIZE = 1 << 20
START = 60.0
"""Seconds for a program to listen: a JVM on a busy machine."""


@dataclass(frozen=True)
class Report:
    """What a foreign client says of one connection."""

    version: str
    resumed: bool
    bytes: int


@dataclass(frozen=True)
class Identity:
    """PEM files, and the same in PKCS#12 with the password "password"."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, files: Files, name: str, *, kind: str = "ec") -> Identity:
        certificate, key = files.leaf(kind, names=(name, "localhost"))
        return cls(certificate, key, files.ca)

    @property
    def pkcs12(self) -> Path:
        path = self.certificate.with_suffix(".p12")
        certificate = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        key: Any = load_pem_private_key(self.key.read_bytes(), None)
        path.write_bytes(
            pkcs12.serialize_key_and_certificates(b"own", key, certificate, None, BestAvailableEncryption(b"password"))
        )
        return path


async def build(*arguments: object, **environment: str) -> None:
    """Compiles something; what the compiler says is the error's text."""
    process = await asyncio.create_subprocess_exec(
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode(errors="replace")


@cache
def build_folder() -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    return BUILD


async def words_of(stack: str) -> list[str]:
    """What starts the program of a stack, which is compiled first if need be."""
    folder = build_folder()
    match stack:
        case "node":
            return ["node", str(PROGRAMS / "peer.js")]
        case "go":
            made = folder / "peer-go"
            await build(
                *("go", "build", "-o", made, PROGRAMS / "peer.go"),
                GO111MODULE="off",
                GOCACHE=str(folder / "go-cache"),
                GOTOOLCHAIN="local",
            )
            return [str(made)]
        case "jsse":
            await build("javac", "-d", folder, PROGRAMS / "Peer.java")
            return ["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", str(folder), "Peer"]
        case "mbedtls":
            made = folder / "peer-mbedtls"
            libraries = ("-lmbedtls", "-lmbedx509", "-lmbedcrypto")
            await build("gcc", "-O1", "-Wall", "-o", made, PROGRAMS / "peer.c", *libraries)
            return [str(made)]
    raise ValueError(stack)


def arguments_of(
    stack: str, role: str, port: int, identity: Identity, version: int, name: str, count: int
) -> list[object]:
    """Of a program in ``programs/``."""
    if stack == "mbedtls":
        return [port, identity.certificate, identity.key, identity.authority, name, SIZE, count]
    own = [identity.pkcs12] if stack == "jsse" else [identity.certificate, identity.key]
    return [role, port, *own, identity.authority, NAMES[version], name, SIZE, count]


@contextlib.asynccontextmanager
async def echo_server(
    stack: str, identity: Identity, version: int, name: str
) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """A program of ``programs/`` that listens at the port, and says what it saw."""
    port = free_port()
    words = await words_of(stack)
    async with program(*words, *arguments_of(stack, "server", port, identity, version, name, 0)) as process:
        await listening_at(port)
        yield port, process


async def listening_at(port: int) -> None:
    """Waits for a listener at 127.0.0.1 in either family: a JVM has an IPv6 socket."""
    wanted = (f"0100007F:{port:04X}", f"0000000000000000FFFF00000100007F:{port:04X}", f":{port:04X}")
    async with asyncio.timeout(START):
        while True:
            for table in ("/proc/net/tcp", "/proc/net/tcp6"):
                lines = Path(table).read_text().splitlines()[1:]  # noqa: ASYNC240 - procfs does not block
                for fields in map(str.split, lines):
                    if fields[3] == "0A" and fields[1].endswith(wanted):
                        return
            await asyncio.sleep(0.02)


async def echo_client(stack: str, port: int, identity: Identity, version: int, name: str, count: int) -> list[Report]:
    """Runs a program of ``programs/`` as a client; a report for each of its connections. AssertionError with its words if it fails."""
    words = await words_of(stack)
    async with program(*words, *arguments_of(stack, "client", port, identity, version, name, count)) as process:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 0, output.decode(errors="replace")
    return [Report(**json.loads(line)) for line in output.splitlines()]


async def said(process: asyncio.subprocess.Process, count: int) -> list[dict[str, Any]]:
    """The next lines of an echo server, one for each connection that ended."""
    assert process.stdout is not None
    lines = [await asyncio.wait_for(process.stdout.readline(), 20) for _ in range(count)]
    return [json.loads(line) for line in lines]


__all__ = ["NAMES", "SIZE", "Identity", "Report", "echo_client", "echo_server", "said"]
