"""A soak during which cards die at random, are started again, and die again: every operation gets a right answer or a documented error,
and no process that lives keeps anything of those that did not.

``make soak`` runs it with 100,000 operations, ``make test`` with fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
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

log = logging.getLogger(__name__)

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

LONG, SHORT = 100_000, 4_000
VMS = ("web", "db")
MORTAL = ("card-web", "card-db", "card-op-1", "card-op-2", "card-xen-1")
OPERATIONS_BETWEEN_DEATHS = (50, 300)
IN_FLIGHT = 48  # of each VM
DEADLINE_MS = 60_000
WARM = 0.2  # of all operations: then caches are full, and memory should stay where it is
GROWTH = 24 * 2**20  # bytes that a process may still grow by
MORE_DESCRIPTORS = 6
SCHEME = operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256
PROTOCOLS = Path(__file__).parents[2] / "docs" / "protocols.md"


def documented_errors() -> set[tuple[str, str]]:
    """Reasons and gRPC codes of the tables in docs/protocols.md, and of the sentence about the agent's."""
    text = PROTOCOLS.read_text()
    found = set()
    for reasons, code in re.findall(r"^\| ([A-Z_, ]+) \| ([A-Z_]+) \|", text, re.MULTILINE):
        found |= {(reason, code) for reason in reasons.split(", ")}
    found |= {("AGENT_BUSY", "RESOURCE_EXHAUSTED"), ("MIDDLEWARE_UNAVAILABLE", "UNAVAILABLE")}
    assert ("SLOT_BUSY", "RESOURCE_EXHAUSTED") in found
    assert ("CARD_UNAVAILABLE", "UNAVAILABLE") in found
    # Documented, but never what a dead card looks like: a fault of ours, or an answer that was not what it should be.
    return {(reason, code) for reason, code in found if code not in ("INTERNAL", "DATA_LOSS", "INVALID_ARGUMENT")}


CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class Outcome:
    """What became of the operations."""

    right: int = 0
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> int:
        return self.right + self.errors.total()


@contextlib.asynccontextmanager
async def dying(stack: Stack, outcome: Outcome, *, seed: int) -> AsyncIterator[None]:
    """Kills a card (SIGKILL) now and then, and starts it again soon, or a little later. All are alive when the context ends."""
    chance = random.Random(seed)  # noqa: S311 - when to kill, no secrets

    async def reaper() -> None:
        while True:
            due = outcome.done + chance.randint(*OPERATIONS_BETWEEN_DEATHS)
            while outcome.done < due:
                outcome.progress.clear()
                await outcome.progress.wait()
            name = chance.choice(MORTAL)
            await asyncio.shield(one_death(name, chance.choice((0.0, 0.1, 0.8))))

    async def one_death(name: str, pause: float) -> None:
        await stack.daemons[name].kill()
        outcome.deaths[name] += 1
        await asyncio.sleep(pause)
        await stack.daemons[name].start()

    task = asyncio.create_task(reaper())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for name in MORTAL:
            for _ in range(200):
                if stack.daemons[name].running:
                    break
                await asyncio.sleep(0.05)


async def ask_agent(stack: Stack, vm: str, operations: int, outcome: Outcome) -> None:
    """So many signatures over one stream of the VM's agent; each is verified."""
    public = load_certificate(stack.layout.certificate(vm).read_bytes()).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    places = asyncio.Semaphore(IN_FLIGHT)
    digests: dict[int, bytes] = {}

    async def ask() -> AsyncIterator[local_pb2.OperateRequest]:
        for number in range(operations):
            await places.acquire()
            digests[number] = hashlib.sha256(f"{vm} {number}".encode()).digest()
            sign = operation_pb2.SignOperation(scheme=SCHEME, digest=digests[number])
            yield local_pb2.OperateRequest(id=number, sign=sign)

    async with grpc.aio.insecure_channel(f"unix:{stack.agent_socket(vm)}") as channel:
        async for answer in local_pb2_grpc.LocalServiceStub(channel).Operate(ask(), timeout=3500):
            digest = digests.pop(answer.id)
            if answer.WhichOneof("outcome") == "output":
                public.verify(answer.output, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
                outcome.right += 1
            else:
                outcome.errors[answer.failure.reason, CODES.get(answer.failure.code, "?")] += 1
            outcome.progress.set()
            places.release()
    assert not digests, "every operation was answered"


async def still_living(stack: Stack) -> dict[str, tuple[int, int]]:
    """Resident bytes and descriptors of the processes that nobody kills."""
    await asyncio.sleep(1)  # what is being closed, and what is being reconnected, is over
    living = {name: psutil.Process(daemon.pid) for name, daemon in stack.daemons.items() if name not in MORTAL}
    return {name: (process.memory_info().rss, process.num_fds()) for name, process in living.items()}


async def soak(stack: Stack, operations: int, *, seed: int) -> Outcome:
    outcome = Outcome()

    async def part(share: float) -> None:
        each = round(operations * share / len(VMS))
        async with dying(stack, outcome, seed=seed + outcome.done):
            await asyncio.gather(*(ask_agent(stack, vm, each, outcome) for vm in VMS))

    await part(WARM)
    before = await still_living(stack)
    await part(1 - WARM)
    after = await still_living(stack)
    grown = {name: rss - before[name][0] for name, (rss, _) in after.items()}
    more = {name: fds - before[name][1] for name, (_, fds) in after.items()}
    log.info("%d right answers; errors %s; deaths %s", outcome.right, dict(outcome.errors), dict(outcome.deaths))
    log.info("grown by bytes %s; by descriptors %s", grown, more)
    assert outcome.done == operations
    assert set(outcome.errors) <= documented_errors(), outcome.errors
    assert outcome.right >= operations * 0.9, outcome.errors
    assert outcome.deaths.total() >= operations / 4000, outcome.deaths
    assert max(grown.values()) < GROWTH, grown
    assert max(more.values()) <= MORE_DESCRIPTORS, more
    assert b"sound" in await stack.middleware("audit", "verify")
    status = json.loads((await stack.gose("status", "--json")).decode())
    assert {card["state"] for card in status["secure_elements"]} == {"in service"}
    assert not any(status["running"]["queues"].values())
    return outcome


@contextlib.asynccontextmanager
async def installation() -> AsyncIterator[Stack]:
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    try:
        async with Stack(folder / "i", vms=VMS, server_cards=2, key="p-256") as stack:
            yield stack
    finally:
        shutil.rmtree(folder)


@pytest.mark.timeout(600)
async def test_cards_die_at_random_and_every_answer_is_right_or_a_clear_error() -> None:
    async with installation() as stack:
        await soak(stack, SHORT, seed=SHORT)


@pytest.mark.long
@pytest.mark.timeout(7200)
async def test_a_hundred_thousand_operations_while_cards_die() -> None:
    async with installation() as stack:
        await soak(stack, LONG, seed=LONG)
