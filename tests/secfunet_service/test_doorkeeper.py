"""Strangers at a door: counted, bounded and timed from accept on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator

import pytest

from secfunet.service.crowd import Crowd
from secfunet.service.doorkeeper import DoorBounds, Doorkeeper, Doorway, Visit

GREETING = b"hello\n"


def test_the_holder_of_most_places_gives_one_up() -> None:
    crowd: Crowd[int] = Crowd(4)
    for member, holder in enumerate(("a", "b", "b", "b")):
        crowd.add(member, holder)
    assert crowd.is_full_for("c")
    assert crowd.victim("c") == 1
    assert crowd.victim("a") == 1
    assert crowd.victim("c", lambda member: member not in (1, 2)) == 3
    assert crowd.victim("c", lambda member: member == 0) is None
    crowd.remove(1)
    crowd.remove(1)
    assert not crowd.is_full_for("c")
    assert len(crowd) == 3


def test_no_holder_has_more_than_its_part() -> None:
    crowd: Crowd[int] = Crowd(10, 2)
    crowd.add(0, "a")
    crowd.add(1, "b")
    crowd.add(2, "b")
    assert not crowd.is_full_for("a")
    assert crowd.is_full_for("b")
    assert crowd.victim("b") == 1


async def echo(visit: Visit) -> None:
    """A door whose handshake is a greeting; it is told by the first byte what to do then."""
    reader, writer = await asyncio.open_connection(sock=visit.take())
    try:
        assert await reader.readexactly(len(GREETING)) == GREETING
        visit.enter()
        while line := await reader.readline():
            visit.busy = line == b"busy\n"
            writer.write(line)
            await writer.drain()
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def opened(
    bounds: DoorBounds | None = None, *, inside: int = 8, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Doorkeeper, Doorway, int]]:
    keeper = Doorkeeper(bounds)
    doorway = await keeper.open("test", echo, host, inside=inside)
    try:
        yield keeper, doorway, doorway.sockets[0].getsockname()[1]
    finally:
        doorway.close()
        doorway.end_all()
        await doorway.wait_closed()


async def talk(port: int, word: bytes = b"word\n", *, source: str = "127.0.0.1") -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(GREETING + word)
    assert await asyncio.wait_for(reader.readline(), 5) == word
    return writer


async def silent(port: int, count: int, *, source: str = "127.0.0.1", word: bytes = b"") -> list[asyncio.StreamReader]:
    readers = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        writer.write(word)
        reader._writer = writer  # type: ignore[attr-defined] # a writer that nobody holds closes its connection
        readers.append(reader)
    return readers


async def ended(readers: list[asyncio.StreamReader]) -> int:
    await asyncio.sleep(0.1)
    return sum(reader.at_eof() or reader.exception() is not None for reader in readers)


@pytest.mark.parametrize("word", [b"", b"h"], ids=["silent", "half a greeting"])
async def test_a_flood_replaces_itself_and_others_are_served(word: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with opened(DoorBounds(silent=80, talking=80)) as (keeper, doorway, port):
        early = await silent(port, 2, source="127.0.0.9", word=word)
        inside = await talk(port)
        flood = await silent(port, 250, word=word)
        await asyncio.sleep(0.1)
        assert len(keeper.silent) + len(keeper.talking) <= 63
        (await talk(port)).close()
        (await talk(port, source="127.0.0.8")).close()
        inside.write(b"still\n")
        assert await ended(flood) >= 185
        assert await ended(early) == 0, "another address keeps its places"
        assert len(doorway.inside) == 1
    lines = [record for record in caplog.records if record.name == "secfunet.service.doorkeeper"]
    assert 1 <= len(lines) <= 12


async def test_strangers_have_their_time_and_no_more() -> None:
    async with opened(DoorBounds(silence=0.1, handshake=0.1)) as (keeper, _, port):
        readers = [*await silent(port, 3), *await silent(port, 3, word=b"h")]
        inside = await talk(port)
        async with asyncio.timeout(5):
            while await ended(readers) < 6:
                pass
        assert keeper.ended == {"silent for too long": 3, "too long in its handshake": 3}
        assert not inside.is_closing()


async def test_who_is_inside_keeps_its_place_from_strangers_and_from_its_like() -> None:
    async with opened(inside=3) as (keeper, doorway, port):
        busy = [await talk(port, b"busy\n") for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GREETING)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        assert keeper.ended["too many connections"] == 1
        for each in busy[:2]:
            each.write(b"idle\n")
        await asyncio.sleep(0.1)
        (await talk(port, source="127.0.0.3")).close()
        assert len(doorway.inside) >= 1


async def test_closing_ends_strangers_and_leaves_those_inside() -> None:
    async with opened() as (keeper, doorway, port):
        strangers = [*await silent(port, 2), *await silent(port, 2, word=b"h")]
        inside = await talk(port)
        doorway.close()
        assert await ended(strangers) == 4
        assert (len(keeper.silent), len(keeper.talking), len(doorway.inside)) == (0, 0, 1)
        inside.close()
        await asyncio.wait_for(doorway.wait_closed(), 5)


SHORT = """
    import asyncio, logging, os, resource, sys, time
    from secfunet.service.doorkeeper import DoorBounds, Doorkeeper
    from tests.secfunet_service.test_doorkeeper import echo

    async def main():
        keeper = Doorkeeper(DoorBounds(silent=5000, talking=5000, per_address=1))
        doorway = await keeper.open("test", echo, "127.0.0.1")
        print(doorway.sockets[0].getsockname()[1], flush=True)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, sys.stdin.readline)
        files = [open(os.devnull) for _ in range(16)]  # others need descriptors, too
        print(flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        for end in range(20):  # and sometimes more than there are
            try:
                while True:
                    files.append(open(os.devnull))
            except OSError:
                await asyncio.sleep(0.1)
        files.clear()
        print(flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        print(time.process_time(), flush=True)
        os._exit(0)

    logging.basicConfig(level=logging.INFO)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
    asyncio.run(main())
"""


async def test_without_descriptors_it_neither_floods_the_log_nor_spins() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(SHORT),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    port = int(await process.stdout.readline())
    flood = await silent(port, 300)
    await asyncio.sleep(2)
    for _ in range(3):
        (await talk(port)).close()
    process.stdin.write(b"\n")
    assert await process.stdout.readline()
    process.stdin.write(b"\n")
    flood += await silent(port, 100)
    assert await process.stdout.readline()
    (await talk(port)).close()
    process.stdin.write(b"\n")
    cpu = await process.stdout.readline()
    errors = (await process.stderr.read()).decode().splitlines()
    assert await process.wait() == 0, "\n".join(errors)
    assert await ended(flood) == 400
    assert float(cpu) < 2.0
    assert any("no connection can be accepted now" in line for line in errors)
    assert len(errors) < 25, errors
