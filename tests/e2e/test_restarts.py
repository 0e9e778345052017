"""Every process is killed (SIGKILL) while operations are under way, and started again: nothing is wrong, lost or half-written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from demo.stack import Stack
from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

CALLERS = 4
DEADLINE = 60.0  # seconds; generous, for machines that are busy
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)


@dataclass
class Load:
    """Callers that sign all the time, and what became of it. Every signature is verified."""

    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def more(self, count: int) -> None:
        """Waits until so many more operations are done."""
        target = self.done + count
        async with asyncio.timeout(DEADLINE * 2):
            while self.done < target:
                self.progress.clear()
                await self.progress.wait()


@contextlib.asynccontextmanager
async def load(stack: Stack, vm: str) -> AsyncIterator[Load]:
    """Signs with ``vm``'s key until the context ends."""
    public = load_certificate(stack.layout.certificate(vm).read_bytes()).public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    state = Load()

    async def caller() -> None:
        async with grpc.aio.insecure_channel(f"unix:{stack.agent_socket(vm)}") as channel:
            stub = local_pb2_grpc.LocalServiceStub(channel)
            while True:
                digest = os.urandom(32)
                sign = operation_pb2.SignOperation(
                    scheme=operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256, digest=digest
                )
                try:
                    answer = await stub.Sign(local_pb2.SignRequest(sign=sign), timeout=DEADLINE)
                except grpc.aio.AioRpcError as error:
                    state.failed[error.code().name] += 1
                    await asyncio.sleep(0.05)
                    continue
                public.verify(answer.signature, digest, PSS, Prehashed(hashes.SHA256()))
                state.done += 1
                state.progress.set()

    callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
    try:
        yield state
        for task in callers:  # a caller ends by itself only if a signature was wrong
            assert not task.done(), task.exception()
    finally:
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


async def kill_and_start(stack: Stack, name: str) -> None:
    daemon = stack.daemons[name]
    await daemon.kill()
    await asyncio.sleep(0.2)
    await daemon.start()


@pytest.mark.parametrize("name", ["card-web", "card-xen-1", "card-op-1", "gose"])
async def test_each_process_is_killed_in_the_middle_of_operations(stack: Stack, name: str) -> None:
    """The grid, the VM's card, the hypervisor's card: every caller gets its signature all the same, within its deadline."""
    async with load(stack, "web") as signing:
        await signing.more(20)
        await kill_and_start(stack, name)
        await signing.more(40)
    assert not signing.failed


async def test_the_grid_is_stopped_cleanly_in_the_middle_of_operations(stack: Stack) -> None:
    async with load(stack, "web") as signing:
        await signing.more(20)
        assert await stack.daemons["gose"].stop() == 0
        await stack.daemons["gose"].start()
        await signing.more(40)
    assert not signing.failed


async def test_the_agent_is_killed_in_the_middle_of_operations(stack: Stack) -> None:
    """Its callers are told, and served again by the next one, which keeps the certificate of the first."""
    async with load(stack, "web") as signing:
        await signing.more(20)
        await kill_and_start(stack, "agent-web")
        await signing.more(40)
    assert set(signing.failed) <= {"UNAVAILABLE"}


async def test_the_middleware_is_killed_in_the_middle_of_operations(stack: Stack) -> None:
    """The embedded hypervisor dies with it, and all domains: callers are told; after a new start of the domain everything works again."""
    async with load(stack, "web") as signing:
        await signing.more(20)
        await stack.daemons["middleware-xen-1"].kill()
        await asyncio.sleep(0.2)
        await stack.daemons["middleware-xen-1"].start()
        states = {entry["name"]: entry["state"] for entry in json.loads(await stack.middleware("vm", "list", "--json"))}
        assert states == {"web": "stopped", "db": "stopped"}
        for vm in stack.vms:
            await stack.daemons[f"agent-{vm}"].kill()
            await stack.start_vm(vm)
        await signing.more(40)
    assert set(signing.failed) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert b"sound" in await stack.middleware("audit", "verify")


async def test_nothing_is_left_over(stack: Stack) -> None:
    """After all that: no half-written file anywhere, and the log is sound."""
    left = [path for path in stack.layout.folder.rglob(".*") if path.is_file()]
    assert left == []
    assert b"sound" in await stack.middleware("audit", "verify")
