"""Strangers at the grid's doors: connections that say nothing, or next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from secfunet.gose.v1 import service_provider_pb2 as pb
from tests.gose.grid import TestGrid, sign_operation

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOORS = ["sessions", "operations", "openid endpoint", "openid login"]


def port_of(grid: TestGrid, door: str) -> int:
    return {
        "sessions": grid.settings.service_provider.https,
        "operations": grid.settings.service_provider.grpc,
        "openid endpoint": grid.settings.openid_provider.endpoint,
        "openid login": grid.settings.openid_provider.login,
    }[door].port


@contextlib.asynccontextmanager
async def flood(port: int, count: int, word: bytes = b"") -> AsyncIterator[None]:
    """``count`` connections that say ``word`` and nothing more, opened again whenever one is closed."""

    async def one() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(word)
                with contextlib.suppress(OSError):
                    await reader.read()
                writer.transport.abort()
            except OSError:
                pass
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await asyncio.sleep(0.5)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def logged_in(grid: TestGrid) -> dict[str, Any]:
    """As a hypervisor logs in: who shares the strangers' address may lose a connection before a word is said, and makes another."""
    for attempt in range(4):
        try:
            return await grid.session("vm-1", "hv-a")
        except (OSError, aiohttp.ClientConnectionError):
            if attempt == 3:
                raise
    raise AssertionError


@pytest.mark.parametrize("door", DOORS)
async def test_silent_strangers_keep_nobody_out(grid: TestGrid, door: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with (
        grid.running(silent_connections=32, talking_connections=32),
        flood(port_of(grid, door), 100),
        flood(port_of(grid, door), 60, b"\x16\x03\x01"),
    ):
        caplog.clear()
        began = asyncio.get_running_loop().time()
        session = await logged_in(grid)
        async with grid.channel("hv-a") as channel:
            answer = await grid.stub(channel).Execute(
                pb.ExecuteRequest(operations=[sign_operation()]),
                metadata=(("secfunet-session", session["session"]),),
                timeout=20,
            )
        assert not answer.failures
        seconds = asyncio.get_running_loop().time() - began
        floods = [record for record in caplog.records if hasattr(record, "times")]
        assert len(floods) <= 8 * (seconds + 1), [record.message for record in floods]


async def test_requests_that_come_in_one_packet_are_no_single_turn_of_the_loop(grid: TestGrid) -> None:
    """Nothing that they ask for is there, so no answer waits for anything."""
    count, turns = 200, 0
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with grid.running():

        async def another() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        port = port_of(grid, "openid endpoint")
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        request = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writer.write(request * count)
        task = asyncio.create_task(another())
        answered = 0
        async with asyncio.timeout(20):
            while answered < count:
                answered += (await reader.read(65536)).count(b"HTTP/1.1 ")
        task.cancel()
        writer.close()
    assert turns >= count


async def test_bodies_that_never_end_keep_nobody_out(grid: TestGrid) -> None:
    """A request whose body does not come is not work that the grid would have to protect."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    head = b"POST /openid HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 900\r\n\r\na="
    async with grid.running(http_connections=4):
        port = port_of(grid, "openid endpoint")
        writers = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(head)
            writers.append(writer)
        await asyncio.sleep(0.3)
        try:
            assert await grid.session("vm-1", "hv-a")
        finally:
            for writer in writers:
                writer.transport.abort()


async def test_a_certificate_alone_is_no_place_inside(grid: TestGrid) -> None:
    """Every certificate of the grid's CA may begin a call; places are kept by those whose calls are let through."""
    async with grid.running() as service:
        door = service.callers._door
        async with grid.channel("hv-b") as other:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await grid.stub(other).Execute(pb.ExecuteRequest(operations=[sign_operation()]), timeout=20)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert door.connections == 0
            session = await logged_in(grid)
            async with grid.channel("hv-a") as channel:
                await grid.stub(channel).Execute(
                    pb.ExecuteRequest(operations=[sign_operation()]),
                    metadata=(("secfunet-session", session["session"]),),
                    timeout=20,
                )
                assert door.connections == 1
