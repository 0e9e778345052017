"""Signatures through the whole chain: a program's gRPC call to its agent, dom0, TLS-Tandem, the grid, the VM's secure element, and back.

The rows' limits are what the chain's own private-key operations alone would allow, with nothing around them: for each signature one
operation with the VM's key in its card, and one of the container authority for each container, which several signatures share; how many
trailers a signature costs is counted at the grid. A VM has one card, and a card does one thing at a time. See ``LEGEND``.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import grpc.aio
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from bench import limits
from bench.hypervisor import hypervisor_client
from bench.plan import Plan, times
from bench.rows import Row
from bench.stage import Stage
from demo.stack import Stack
from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.card import KeyAlgorithm
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from tests.support.cards import personalise, running_card
from tests.support.pki import CertificateAuthority
from vm_agent.enrolment import EnrolmentStore, channel_options

SCHEME = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
AT_ONCE = (1, 8, 32)
EACH_OF_SEVERAL = 8  # at once, when several VMs sign
LIMIT = "limit of one VM's chain: its private-key operations alone"
LIMIT_OF_SEVERAL = "limit of {} VMs' chains: their private-key operations alone"
TRAILERS = "  trailers a signature, {}"
LEGEND = """\
t: one private-key operation of RSA-2048 in process (the VM's key and the container authority's are of that kind).
r: trailers a signature, as counted at the grid. A VM has one card, which works serially, so one VM's limit is
min(1 / t, cores / (t + r t)), and that of several VMs is cores / (t + r t). The program that asks runs on the same cores,
and is part of what is measured."""
MAX_OVERHEAD = 5.0  # milliseconds
SHARE = 0.5
DEADLINE = 30.0


async def measure(plan: Plan, stage: Stage) -> None:
    """Throughput unary and stream, of one VM and of several; latency, overhead, and each hop."""
    key_operation = plan.rows[limits.RSA]
    plan.notes.append(LEGEND)
    stack = await stage.stack()
    async with AsyncExitStack() as channels:
        stubs = []
        for vm in stack.vms:
            channel = await channels.enter_async_context(grpc.aio.insecure_channel(f"unix:{stack.agent_socket(vm)}"))
            stubs.append(local_pb2_grpc.LocalServiceStub(channel))
            await _check(stubs[-1])
        stub = stubs[0]
        counter = Counter(stack)
        found: dict[tuple[str, int], Rounds] = {}
        for kind, run in (("unary", _unary), ("stream", _stream)):
            for at_once in AT_ONCE:
                found[kind, at_once] = await _rounds(plan, counter, partial(run, stub, at_once, plan.seconds))
        busiest = [trailers for (_, at_once), rounds in found.items() if at_once == 32 for trailers in rounds.trailers]
        limit = _add_limit(plan, key_operation, LIMIT, "one VM, 32 at once", busiest, cards=1)
        for (kind, at_once), rounds in found.items():
            row = Row.of(f"signatures through the chain, {at_once} at once, {kind}", "1/s", rounds.rates).against(limit)
            plan.add(row.at_least(SHARE) if at_once == 32 else row)
        several = len(stubs)

        async def together() -> float:
            return sum(await asyncio.gather(*(_stream(one, EACH_OF_SEVERAL, plan.seconds) for one in stubs)))

        rounds = await _rounds(plan, counter, together)
        name = f"{several} VMs, {EACH_OF_SEVERAL} at once each"
        limit = _add_limit(plan, key_operation, LIMIT_OF_SEVERAL.format(several), name, rounds.trailers, cards=several)
        plan.add(Row.of(f"signatures through the chain, {name}, stream", "1/s", rounds.rates).against(limit))
        await _where_the_time_goes(plan, stack, stub)
        whole = plan.add(Row.of("one signature through the chain, alone", "ms", await times(plan, lambda: sign(stub))))
        keys = 2 * 1000 / key_operation.median  # the VM's signature and a trailer of its own
        overhead = Row(
            "  of that outside the private-key operations",
            "ms",
            whole.median - keys,
            whole.min - keys,
            whole.max - keys,
        )
        plan.add(overhead.against(whole).below(MAX_OVERHEAD))
        local = Row.of(
            "  round trip program to agent and back",
            "ms",
            await times(plan, lambda: stub.GetStatus(local_pb2.GetStatusRequest())),
        )
        plan.add(local.against(whole))
    await _hops(plan, stage, whole)


class Counter:
    """Containers that the grid has made: each has one trailer."""

    def __init__(self, stack: Stack) -> None:
        self._path = stack.layout.grid / "state" / "answers.sqlite"

    def containers(self) -> int:
        """Since the grid was made; containers are numbered in the order in which they are kept."""
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as database:
            row = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'containers'").fetchone()
        return int(row[0]) if row else 0


@dataclass
class Rounds:
    """Signatures a second and trailers a signature, of each round."""

    rates: list[float] = field(default_factory=list)
    trailers: list[float] = field(default_factory=list)


async def _rounds(plan: Plan, counter: Counter, run: Callable[[], Awaitable[float]]) -> Rounds:
    rounds = Rounds()
    for _ in range(plan.rounds):
        before, begin = counter.containers(), time.perf_counter()
        rate = await run()
        signatures = rate * (time.perf_counter() - begin)
        rounds.rates.append(rate)
        rounds.trailers.append((counter.containers() - before) / signatures)
    return rounds


def _add_limit(plan: Plan, key_operation: Row, name: str, who: str, trailers: list[float], *, cards: int) -> Row:
    """See ``LEGEND``."""
    counted = plan.add(Row.of(TRAILERS.format(who), "", trailers))
    share = min(cards, len(os.sched_getaffinity(0)) / (1 + counted.median))
    limit = Row(name, "1/s", key_operation.median * share, key_operation.min * share, key_operation.max * share)
    return plan.add(limit.against(key_operation))


async def _where_the_time_goes(plan: Plan, stack: Stack, stub: local_pb2_grpc.LocalServiceAsyncStub) -> None:
    """Processor time that each process spends on one signature, 32 at once on a stream."""
    card, agent = f"card-{stack.vms[0]}", f"agent-{stack.vms[0]}"
    chosen = {
        "the program": [os.getpid()],
        "the agent": [stack.daemons[agent].pid],
        "the Secure Middleware": [stack.daemons[f"middleware-{stack.host}"].pid],
        "the grid": [stack.daemons["gose"].pid],
        "the VM's secure element": [stack.daemons[card].pid],
    }
    processes = {name: [psutil.Process(pid) for pid in pids] for name, pids in chosen.items()}

    def used() -> dict[str, float]:
        times = {name: [process.cpu_times() for process in found] for name, found in processes.items()}
        return {name: sum(one.user + one.system for one in found) for name, found in times.items()}

    spent: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(plan.rounds):
        before, seconds = used(), plan.seconds
        done = await _stream(stub, 32, seconds) * seconds
        for name, after in used().items():
            spent[name].append((after - before[name]) / done * 1e6)
    whole = plan.add(
        Row.of(
            "processor time of a signature, 32 at once", "us", [sum(one) for one in zip(*spent.values(), strict=True)]
        )
    )
    for name, found in spent.items():
        plan.add(Row.of(f"  of that {name}", "us", found).against(whole))


async def _hops(plan: Plan, stage: Stage, whole: Row) -> None:
    """Asks at each door of the chain in turn; a hop's time is the difference between two doors."""
    at_card = await _at_card(plan)
    at_grid = await _at_grid(plan, stage)
    at_middleware = await _at_middleware(plan, stage)
    doors = [
        ("  hop: the secure element, by APDU", at_card, 0.0),
        ("  hop: the grid and TLS-Tandem", at_grid, at_card.median),
        ("  hop: the Secure Middleware", at_middleware, at_grid.median),
        ("  hop: the agent", whole, at_middleware.median),
    ]
    for name, door, below in doors:
        hop = replace(door, name=name, median=door.median - below, min=door.min - below, max=door.max - below, aim=None)
        plan.add(hop.against(whole))


async def _at_card(plan: Plan) -> Row:
    """A card of its own, with the same kind of key."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with running_card(Path(folder)) as card:
            await personalise(card, CertificateAuthority("Bench CA"), "vm", algorithm=KeyAlgorithm.RSA_2048)
            client = await card.connect("vm")
            try:
                return Row.of("at the card", "ms", await times(plan, lambda: client.sign(SCHEME, os.urandom(32))))
            finally:
                await client.close()


async def _at_grid(plan: Plan, stage: Stage) -> Row:
    """As the Secure Middleware of the second host: a session of a VM, operations under it."""
    stack = await stage.stack()
    async with hypervisor_client(stack) as (client, vm_certificate, token):
        session = await client.open_session(vm_certificate, token, timeout=DEADLINE)

        async def execute() -> None:
            answer = await session.execute([_operation()], timeout=DEADLINE)
            await client.content_key(answer.containers[0], timeout=DEADLINE)

        return Row.of("at the grid", "ms", await times(plan, execute))


async def _at_middleware(plan: Plan, stage: Stage) -> Row:
    """As the VM's agent, with the agent's own certificate."""
    stack = await stage.stack()
    enrolment = EnrolmentStore(stack.layout.guest(stack.vms[0]) / "state").load()
    if enrolment is None:
        raise RuntimeError("the agent has not enrolled")
    options = channel_options(enrolment.server_name, enrolment.agent)
    async with grpc.aio.secure_channel(enrolment.agent, enrolment.credentials(), options) as channel:
        call = agent_pb2_grpc.AgentServiceStub(channel).Operate()
        numbers = iter(range(1, 1 << 40))

        async def operate() -> None:
            request = agent_pb2.OperateRequest(batch_id=next(numbers), operations=[_operation()], timeout_ms=30_000)
            await call.write(request)
            response = await call.read()
            if not isinstance(response, agent_pb2.OperateResponse) or not response.results:
                raise RuntimeError(f"the Secure Middleware did not answer: {response}")

        row = Row.of("at the middleware", "ms", await times(plan, operate))
        call.cancel()
        return row


def _operation() -> operation_pb2.Operation:
    sign = operation_pb2.SignOperation(scheme=SCHEME, digest=os.urandom(32))
    return operation_pb2.Operation(request_id=secrets.token_bytes(16), sign=sign)


async def sign(stub: local_pb2_grpc.LocalServiceAsyncStub) -> bytes:
    """A signature of the VM at whose agent ``stub`` is."""
    sign = operation_pb2.SignOperation(scheme=SCHEME, digest=os.urandom(32))
    return (await stub.Sign(local_pb2.SignRequest(sign=sign), timeout=DEADLINE)).signature


async def _check(stub: local_pb2_grpc.LocalServiceAsyncStub) -> None:
    """What is measured is right: one signature verified with the VM's certificate."""
    identity = await stub.GetIdentity(local_pb2.GetIdentityRequest(), timeout=DEADLINE)
    certificate: x509.Certificate = load_certificate(identity.vm_certificate)
    public = certificate.public_key()
    if not isinstance(public, rsa.RSAPublicKey):
        raise TypeError("the VM's key must be RSA here")
    digest = os.urandom(32)
    sign = operation_pb2.SignOperation(scheme=SCHEME, digest=digest)
    signature = (await stub.Sign(local_pb2.SignRequest(sign=sign), timeout=DEADLINE)).signature
    public.verify(signature, digest, padding.PSS(padding.MGF1(hashes.SHA256()), 32), utils.Prehashed(hashes.SHA256()))


async def _unary(stub: local_pb2_grpc.LocalServiceAsyncStub, at_once: int, seconds: float) -> float:
    begin = time.perf_counter()

    async def caller() -> int:
        done = 0
        while time.perf_counter() - begin < seconds:
            await sign(stub)
            done += 1
        return done

    done = sum(await asyncio.gather(*(caller() for _ in range(at_once))))
    return done / (time.perf_counter() - begin)


async def _stream(stub: local_pb2_grpc.LocalServiceAsyncStub, at_once: int, seconds: float) -> float:
    """``at_once`` requests are under way at any time; each answer calls for the next."""
    begin = time.perf_counter()
    places = asyncio.Semaphore(at_once)

    async def requests() -> AsyncIterator[local_pb2.OperateRequest]:
        number = 0
        while True:
            await places.acquire()
            if time.perf_counter() - begin >= seconds:
                return
            number += 1
            yield local_pb2.OperateRequest(
                id=number, sign=operation_pb2.SignOperation(scheme=SCHEME, digest=os.urandom(32))
            )

    done = 0
    async for answer in stub.Operate(requests()):
        if not answer.output:
            raise RuntimeError(f"an operation failed: {answer.failure.reason}")
        done += 1
        places.release()
    return done / (time.perf_counter() - begin)
