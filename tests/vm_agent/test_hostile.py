"""A local program that may open the socket and means harm: it gets its share, and the others theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from secfunet.agent.v1 import local_pb2
from secfunet.gose.v1 import operation_pb2
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import MiddlewareDouble
from tests.vm_agent.test_service import DIGEST, PSS, running
from vm_agent import local_socket
from vm_agent.errors import AgentError, OverloadedError
from vm_agent.local_api import LocalApi
from vm_agent.local_socket import Caller, share_of
from vm_agent.options import AgentOptions

SIGN = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=PSS, digest=DIGEST))


async def test_one_user_does_not_take_every_connection(
    middleware: MiddlewareDouble, options: AgentOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first twenty come from one user (as the kernel would say), what comes then from another."""
    users = iter([1000] * 20)
    monkeypatch.setattr(local_socket, "peer_of", lambda _: Caller(pid=1, uid=next(users, 1001), gid=1))
    limited = replace(options, limits=replace(options.limits, connections=8))
    async with running(limited) as (service, stub):
        await eventually(lambda: service.status().connected)
        greedy = [await asyncio.open_unix_connection(str(options.socket)) for _ in range(20)]
        await asyncio.sleep(0.1)
        ended = [asyncio.create_task(reader.read()) for reader, _ in greedy]
        done, waiting = await asyncio.wait(ended, timeout=0.5)
        assert (len(done), len(waiting)) == (20 - share_of(8), share_of(8))
        assert share_of(8) == 6
        assert (await stub.Sign(SIGN, timeout=10)).signature
        for _, writer in greedy:
            writer.close()
        await asyncio.gather(*ended, return_exceptions=True)


class StuckCore:
    """Operations begin and do not end."""

    def __init__(self) -> None:
        self.begun = 0
        self.never = asyncio.Event()

    async def operate(self, operation: operation_pb2.Operation, *, timeout: float) -> bytes:
        self.begun += 1
        await self.never.wait()
        return b""


async def test_one_user_does_not_fill_the_queue(options: AgentOptions) -> None:
    core: Any = StuckCore()
    api = LocalApi(core, replace(options.limits, waiting=8))
    operation = operation_pb2.Operation(sign=SIGN.sign)

    def begin(uid: int) -> asyncio.Task[bytes]:
        return asyncio.create_task(api._execute(operation, 10, uid))

    greedy = [begin(1) for _ in range(20)]
    modest = begin(2)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    outcomes = Counter(type(task.exception()) if task.done() else None for task in greedy)
    assert outcomes == {OverloadedError: 20 - share_of(8), None: share_of(8)}
    assert not modest.done()
    for task in (*greedy, modest):
        task.cancel()
    await asyncio.gather(*greedy, modest, return_exceptions=True)
    assert not api._waiting
    # Whoever gave its place back may ask again.
    again = begin(1)
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)
    assert issubclass(OverloadedError, AgentError)


async def test_bytes_that_are_no_http2_and_callers_that_say_nothing(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        held = []
        for untrusted in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(100_000),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 5000,
        ):
            one = socket.socket(socket.AF_UNIX)
            one.setblocking(False)
            await asyncio.get_running_loop().sock_connect(one, str(options.socket))
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(one, untrusted), 5)
            held.append(one)
        await asyncio.sleep(0.2)
        answer = await stub.Sign(SIGN, timeout=10)
        assert answer.signature
        for one in held:
            one.close()


async def test_a_small_message_does_not_unfold_into_a_large_one(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    bomb = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=PSS, digest=bytes(20_000_000)))
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(bomb, timeout=10, compression=grpc.Compression.Gzip)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await stub.Sign(SIGN, timeout=10)
