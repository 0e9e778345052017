"""A quiet VM beside a hostile one: how many signatures it still makes, and how long dom0's event loop keeps anybody waiting.

The hostile VM is a process that does its worst on its own channel of the running installation (``python -m bench.hostile MODE …``),
for as long as the quiet one signs. It is compared with a process that burns its processor time in an empty loop: the machine's cores are
not dom0's to share out. A vchan is another matter: this machine has none, so the ring is in memory, always full, and Link and Multiplexer
are dom0's; ``make test-xen`` does the same over a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio

from bench.chain import SCHEME, sign
from bench.plan import Plan
from bench.rows import Row
from bench.stage import Stage
from secfunet.agent.v1 import local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from tests.secfunet_xen.hostile import EFFECTLESS, Ring, bytes_one_by_one, flooded, opens_and_resets
from vm_agent.enrolment import EnrolmentStore, channel_options

SHARE = 0.7
MOST_DELAY = 50.0  # milliseconds
HELD = 400  # connections
MODES = ("refusals", "cancelled", "connections", "garbage", "silence", "halves")
LOOP = "loop"
LEGEND = f"""\
The hostile VM, on its own channel: calls that are refused, with its own certificate; calls that it cancels at once; connections that end at
once; garbage in place of TLS; {HELD} connections that say nothing; half a ClientHello in each."""


async def measure(plan: Plan, stage: Stage) -> None:
    """Rows of signatures, and of the longest wait in dom0's loop."""
    plan.notes.append(LEGEND)
    await _signatures(plan, stage)
    await _vchan(plan)


async def _signatures(plan: Plan, stage: Stage) -> None:
    stack = await stage.stack()
    quiet, loud = stack.vms[:2]
    kept = stack.layout.guest(loud) / "state"
    async with grpc.aio.insecure_channel(f"unix:{stack.agent_socket(quiet)}") as channel:
        stub = local_pb2_grpc.LocalServiceStub(channel)
        seconds = max(1.0, plan.seconds)

        async def rate() -> float:
            done, begin = 0, time.perf_counter()
            while (passed := time.perf_counter() - begin) < seconds:
                await sign(stub)
                done += 1
            return done / passed

        await rate()
        plan.add(Row.of("signatures of a quiet VM, alone", "1/s", [await rate() for _ in range(plan.rounds)]))
        for mode in MODES:
            # Turn about, as what else the machine does changes.
            async with _stopped(LOOP, kept) as loop, _stopped(mode, kept) as hostile:
                samples: dict[asyncio.subprocess.Process, list[float]] = {loop: [], hostile: []}
                for _ in range(plan.rounds):
                    for process, rates in samples.items():
                        process.send_signal(signal.SIGCONT)
                        rates.append(await rate())
                        process.send_signal(signal.SIGSTOP)
            before = plan.add(Row.of(f"a quiet VM beside an empty loop, in turn with {mode}", "1/s", samples[loop]))
            row = Row.of(f"a quiet VM beside a hostile one: {mode}", "1/s", samples[hostile])
            plan.add(row.against(before).at_least(SHARE))


@contextlib.asynccontextmanager
async def _stopped(mode: str, kept: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that does it, whenever it is let go on."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.hostile", mode, str(kept)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    if not await process.stdout.readline():
        raise RuntimeError(f"the hostile VM does not run: {mode}")
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def _vchan(plan: Plan) -> None:
    """Each flood for as long as dom0 bears it, or for ``plan.seconds``."""
    floods: dict[str, Callable[[], Iterator[bytes]]] = {
        "nothing": lambda: iter(()),
        **{what: lambda what=what: _again(*EFFECTLESS[what]) for what in EFFECTLESS},  # type: ignore[misc]
        "opens and resets": lambda: opens_and_resets(b"agent"),
        "data, a byte a frame": bytes_one_by_one,
    }
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        for what, frames in floods.items():
            worst = [await _longest_wait(Path(name), frames(), plan.seconds) for _ in range(min(plan.rounds, 3))]
            row = Row.of(f"longest wait of another task, a vchan with {what}", "ms", worst)
            plan.add(row if what == "nothing" else row.below(MOST_DELAY))


def _again(first: list[bytes], frame: bytes) -> Iterator[bytes]:
    return itertools.chain(first, itertools.repeat(frame))


async def _longest_wait(folder: Path, frames: Iterator[bytes], seconds: float) -> float:
    worst = 0.0

    async def another() -> None:
        nonlocal worst
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(0.005)
            worst = max(worst, (time.perf_counter() - begin - 0.005) * 1000)

    async with flooded(folder, Ring(frames)) as (_, running):
        task = asyncio.create_task(another())
        await asyncio.wait([running], timeout=seconds)
        task.cancel()
    return worst


def _attack(mode: str, kept: Path) -> None:
    """Of the hostile VM's process; never returns."""
    enrolment = EnrolmentStore(kept).load()
    assert enrolment is not None
    agent = enrolment.agent.removeprefix("unix:")
    print("here", flush=True)
    if mode == LOOP:
        while True:
            pass
    elif mode in ("refusals", "cancelled"):
        asyncio.run(_calls(kept, cancelled=mode == "cancelled"))
    elif mode in ("silence", "halves"):
        held = []
        while True:
            with contextlib.suppress(OSError):
                one = socket.socket(socket.AF_UNIX)
                one.settimeout(1)
                one.connect(agent)
                if mode == "halves":
                    one.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + secrets.token_bytes(32))
                held.append(one)
            if len(held) >= HELD:
                held.pop(0).close()
    else:
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
                one.settimeout(1)
                one.connect(agent)
                if mode == "garbage":
                    one.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
                    one.recv(100)


async def _calls(kept: Path, *, cancelled: bool) -> None:
    enrolment = EnrolmentStore(kept).load()
    assert enrolment is not None
    options = channel_options(enrolment.server_name, enrolment.agent)
    async with grpc.aio.secure_channel(enrolment.agent, enrolment.credentials(), options) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)

        async def ask() -> None:
            unsound = operation_pb2.SignOperation(scheme=SCHEME, digest=os.urandom(7))
            while True:
                call = stub.Sign(agent_pb2.SignRequest(request_id=os.urandom(16), sign=unsound), timeout=5)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if not cancelled:
                        await call
                    else:
                        await asyncio.sleep(0.001)
                        call.cancel()

        await asyncio.gather(*(ask() for _ in range(32)))


if __name__ == "__main__":
    _attack(sys.argv[1], Path(sys.argv[2]))
