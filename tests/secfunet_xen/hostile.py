"""A guest that writes as fast as dom0 reads, over a ring in memory: for the tests and the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from secfunet.xen.link import Link
from secfunet.xen.multiplex import FrameType

RING = 16384
HELLO = bytes([1, 0, 0, 5, 0, 0, 0, 0]) + b"SFXM\x01"


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">BBHI", kind, 0, len(payload), stream) + payload


EFFECTLESS: dict[str, tuple[list[bytes], bytes]] = {
    "empty data": ([frame(FrameType.OPEN, 1, b"agent")], frame(FrameType.DATA, 1)),
    "no credit": ([frame(FrameType.OPEN, 1, b"agent")], frame(FrameType.CREDIT, 1, bytes(4))),
    "answers to nothing": ([], frame(FrameType.PONG)),
    "questions": ([], frame(FrameType.PING, 0, b"12345678")),
    "data of a stream that is over": (
        [frame(FrameType.OPEN, 1, b"agent"), frame(FrameType.RESET, 1, b"\2")],
        frame(FrameType.DATA, 1, b"x"),
    ),
    "ends of a stream that is over": (
        [frame(FrameType.OPEN, 1, b"agent"), frame(FrameType.RESET, 1, b"\2")],
        frame(FrameType.END, 1),
    ),
    "resets of a stream that is over": (
        [frame(FrameType.OPEN, 1, b"agent"), frame(FrameType.RESET, 1, b"\2")],
        frame(FrameType.RESET, 1, b"\2"),
    ),
}


def opens(service: bytes) -> Iterator[bytes]:
    return (frame(FrameType.OPEN, number, service) for number in itertools.count(1))


def opens_and_resets(service: bytes) -> Iterator[bytes]:
    for number in itertools.count(1):
        yield frame(FrameType.OPEN, number, service) + frame(FrameType.RESET, number, b"\2")


def bytes_one_by_one() -> Iterator[bytes]:
    """Data that a service takes as it comes: all of it is as the protocol has it."""
    yield frame(FrameType.OPEN, 1, b"agent")
    yield from itertools.repeat(frame(FrameType.DATA, 1, b"x"))


class Ring:
    """A channel that is always readable, as a guest on a processor of its own keeps it: ``read`` never waits."""

    def __init__(self, frames: Iterator[bytes]) -> None:
        """``frames``: after HELLO."""
        self._frames = itertools.chain([HELLO], frames)
        self.taken = 0
        self.closed = False

    async def read(self) -> bytes:
        data = bytearray()
        while len(data) < RING - 64:
            if not (one := next(self._frames, b"")):
                break
            data += one
        self.taken += len(data)
        return bytes(data)

    async def write(self, data: bytes) -> None:
        return

    async def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        raise AssertionError("dom0 keeps nothing")


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The service behind the channel."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass
    writer.close()


@contextlib.asynccontextmanager
async def flooded(folder: Path, ring: Ring) -> AsyncIterator[tuple[Link, asyncio.Task[str]]]:
    """dom0's end of the channel, at work, with a service "agent"."""
    path = folder / "agent"
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(swallow, path)
    link = Link(ring, services={"agent": path})
    running = asyncio.create_task(link.run())
    try:
        yield link, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()
