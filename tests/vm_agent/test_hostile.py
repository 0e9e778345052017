"""A local program that may open the socket and means harm: it gets its share, and the others theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import MiddlewareDouble
from tests.vm_agent.test_service import DIGEST, PSS, running
from vm_agent import local_socket
from vm_agent.errors import AgentError, OverloadedError
from vm_agent.local_api import LocalApi
from vm_agent.local_socket import Caller, share_of
from vm_agent.options import AgentOptions
from vm_agent.origin import Origin

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
        return asyncio.create_task(api._execute(operation, 10, Origin("a", Caller(1, uid, uid))))

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


def abstract_names() -> list[str]:
    return [line.split("@")[1] for line in Path("/proc/net/unix").read_text().splitlines() if "@" in line]


async def test_nobody_can_take_the_names_of_connections_to_come(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    """Abstract names have no owner, and everybody on the host can read those in use."""
    taken = []
    known = set(abstract_names())
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
        for number in range(20):
            fresh = set(abstract_names()) - known
            known |= fresh
            for name in fresh:
                # What a neighbour of each name would be, if names had neighbours: their numbers counted on, in each base.
                for found in {*re.findall(r"\d+", name), *re.findall(r"[0-9a-f]{2,}", name)}:
                    for base in (10, 16):
                        squatter = socket.socket(socket.AF_UNIX)
                        try:
                            following = f"{int(found, base) + 1:{'d' if base == 10 else 'x'}}"
                            wanted = name.replace(found, following, 1)
                            squatter.bind(f"\0{wanted}")
                            taken.append(squatter)
                            known.add(wanted)
                        except (OSError, ValueError):
                            squatter.close()
            async with grpc.aio.insecure_channel(
                f"unix:{options.socket}", options=[("grpc.use_local_subchannel_pool", 1), ("test", number)]
            ) as channel:
                answer = await local_pb2_grpc.LocalServiceStub(channel).Sign(SIGN, timeout=10)
                assert answer.signature
    for squatter in taken:
        squatter.close()


async def test_one_user_does_not_open_streams_without_end(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(replace(options, limits=replace(options.limits, streams=2))) as (service, stub):
        await eventually(lambda: service.status().connected)
        calls = []
        for number in range(3):
            call = stub.Operate()
            await call.write(local_pb2.OperateRequest(id=number, sign=SIGN.sign))
            calls.append(call)
            if number < 2:
                assert (await call.read()).output
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await calls[2].read()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await calls[0].done_writing()
        assert await calls[0].read() is grpc.aio.EOF
        again = stub.Operate()
        await again.write(local_pb2.OperateRequest(id=4, sign=SIGN.sign))
        assert (await again.read()).output


def rss(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


async def test_one_user_does_not_make_the_agent_large(options: AgentOptions) -> None:
    """47 connections of 600 streams each, on which much is sent and nothing read: below the unit's MemoryMax, and the next is served."""
    config = options.socket.parent / "vm-agent.toml"
    config.write_text(f'join = "none.json"\nstate = "{options.state}"\nsocket = "{options.socket}"\n')
    agent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from vm_agent.cli import main; main()",
        "serve",
        "--config",
        str(config),
        stderr=subprocess.DEVNULL,
    )
    flood = None
    try:
        await eventually(lambda: options.socket.exists(), timeout=20)
        before = rss(agent.pid)
        flood = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STREAMS, str(options.socket), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        largest, end = before, time.monotonic() + 8
        while time.monotonic() < end:
            largest = max(largest, rss(agent.pid))
            await asyncio.sleep(0.1)
        async with grpc.aio.insecure_channel(f"unix:{options.socket}") as channel:
            status = await local_pb2_grpc.LocalServiceStub(channel).GetStatus(local_pb2.GetStatusRequest(), timeout=10)
            assert status.version
        unit = (ROOT / "packaging/deb/tree/lib/systemd/system/secfunet-vm-agent.service").read_text()
        allowed = int(re.findall(r"MemoryMax=(\d+)M", unit)[0])
        print(f"{before:.0f} -> {largest:.0f} MiB")  # noqa: T201 - for whoever looks
        assert largest < allowed
    finally:
        for process in (flood, agent):
            if process is not None:
                process.kill()
                await process.wait()


ROOT = Path(__file__).parents[2]
STREAMS = """
import asyncio, sys
import grpc.aio
from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
REQUEST = local_pb2.OperateRequest(id=1, encrypt=operation_pb2.EncryptOperation(scheme=1, plaintext=b"x" * 500)).SerializeToString()

async def stream(channel):
    while True:
        try:
            call = channel.stream_stream("/secfunet.agent.v1.LocalService/Operate")()
            while True:
                await call.write(REQUEST)
        except Exception:
            await asyncio.sleep(0.05)

async def main():
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"unix:{sys.argv[1]}", options=options) for _ in range(47)]
    await asyncio.gather(*(stream(channel) for channel in channels for _ in range(600)))

asyncio.run(main())
"""
