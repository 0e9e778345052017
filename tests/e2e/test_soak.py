"""More operations through the whole chain than 16 bits can count, over one stream, one session and one content key after another."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import psutil
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from demo.stack import Stack
from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]

OPERATIONS = 66_000
WARM = 16_000  # after so many, caches are full and memory should stay where it is
IN_FLIGHT = 128
GROWTH = 24 * 2**20  # bytes that a process may still grow by
SCHEME = operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256


def memory(stack: Stack) -> dict[str, int]:
    """Resident bytes of every process."""
    return {name: psutil.Process(daemon.pid).memory_info().rss for name, daemon in stack.daemons.items()}


def descriptors(stack: Stack) -> dict[str, int]:
    return {name: psutil.Process(daemon.pid).num_fds() for name, daemon in stack.daemons.items()}


async def test_past_sixteen_bits() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    try:
        async with Stack(folder / "i", vms=("web",), server_cards=1, key="p-256") as stack:
            await soak(stack)
    finally:
        shutil.rmtree(folder)


async def soak(stack: Stack) -> None:
    public = load_certificate(stack.layout.certificate("web").read_bytes()).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    places = asyncio.Semaphore(IN_FLIGHT)
    digests = {}

    async def ask() -> AsyncIterator[local_pb2.OperateRequest]:
        for number in range(OPERATIONS):
            await places.acquire()
            digests[number] = hashlib.sha256(number.to_bytes(8)).digest()
            sign = operation_pb2.SignOperation(scheme=SCHEME, digest=digests[number])
            yield local_pb2.OperateRequest(id=number, sign=sign)

    before: dict[str, int] = {}
    opened: dict[str, int] = {}
    done = 0
    async with grpc.aio.insecure_channel(f"unix:{stack.agent_socket('web')}") as channel:
        stub = local_pb2_grpc.LocalServiceStub(channel)
        async for answer in stub.Operate(ask(), timeout=800):
            assert answer.WhichOneof("outcome") == "output", answer.failure
            public.verify(answer.output, digests.pop(answer.id), ec.ECDSA(Prehashed(hashes.SHA256())))
            places.release()
            done += 1
            if done == WARM:
                before, opened = memory(stack), descriptors(stack)
        assert done == OPERATIONS
        assert not digests
        grown = {name: size - before[name] for name, size in memory(stack).items()}
        assert max(grown.values()) < GROWTH, grown
        more = {name: count - opened[name] for name, count in descriptors(stack).items()}
        assert max(more.values()) <= 4, more
    assert b"sound" in await stack.middleware("audit", "verify")
