"""A VM that asks for one signature after the other, alone and beside a neighbour that floods the grid: how its slowest answers change.

The neighbour is a hostile program at the grid's door, in a process of its own (``python -m bench.neighbour``): it keeps a stream full of
batches of 64, and some callers that ask again at once whatever they are told. No Secure Middleware bounds it here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio

from bench.driver import Driver
from bench.load_grid import LoadGrid
from bench.plan import Plan
from bench.rows import Row
from secfunet.gose.v1 import service_provider_pb2 as pb
from secfunet.gose.v1 import service_provider_pb2_grpc as pb_grpc
from tests.gose.grid import sign_operation

QUIET, LOUD = "vm-0", "vm-8"  # of one hypervisor
FASTER = 0.02
MOST = 2.0
CALLERS = 32
BATCHES = 16


async def measure(plan: Plan, load: LoadGrid, folder: Path) -> None:
    """With cards of the speed that the grid has now, and with much faster ones, for which the grid's own time counts more."""
    await _compare(plan, load, folder, "T = 0.35 s", max(10.0, 20 * plan.seconds))
    await load.start({vm: {"private_key": FASTER} for vm in (QUIET, LOUD)})
    await _compare(plan, load, folder, f"T = {FASTER} s", max(3.0, 5 * plan.seconds))


async def _compare(plan: Plan, load: LoadGrid, folder: Path, name: str, seconds: float) -> None:
    async with Driver(load) as driver:
        await driver.log_in([QUIET, LOUD])
        alone = await _times(driver, seconds)
        async with _flood(driver, load, folder) as refused:
            beside = await _times(driver, seconds)
        before = plan.add(Row.of(f"slowest of a hundred answers of a quiet VM, alone, {name}", "ms", [_p99(alone)]))
        plan.add(
            Row.of(f"the same, a neighbour floods the grid, {name}", "ms", [_p99(beside)]).against(before).at_most(MOST)
        )
        plan.add(Row.of(f"  refused to the neighbour, {name}", "1/s", [refused[0] / seconds]))


async def _times(driver: Driver, seconds: float) -> list[float]:
    """Milliseconds of each answer, one after the other."""
    answers = await driver.sign([QUIET], seconds=seconds, depth=1)
    driver.check(answers)
    times = answers[0].times
    return [(after - before) * 1000 for before, after in itertools.pairwise(times)]


def _p99(times: list[float]) -> float:
    return sorted(times)[-(-len(times) * 99 // 100) - 1]


@asynccontextmanager
async def _flood(driver: Driver, load: LoadGrid, folder: Path) -> AsyncIterator[list[int]]:
    """While the context lasts; then the list has how many calls were refused."""
    pem = load.grid.hypervisor(load.hypervisor_of(LOUD)).pem
    told = {
        "address": f"localhost:{load.grid.settings.service_provider.grpc.port}",
        "authority": str(load.grid.authority.ca_path),
        "pem": str(pem),
        "session": driver.sessions[LOUD],
    }
    (folder / "flood.json").write_text(json.dumps(told))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.neighbour", str(folder / "flood.json")),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    refused: list[int] = []
    try:
        yield refused
    finally:
        process.terminate()
        output, _ = await process.communicate()
        refused.append(int(output or b"0"))


async def _be_loud(told: dict[str, str], credentials: grpc.ChannelCredentials) -> None:
    metadata = (("secfunet-session", told["session"]),)
    refused = 0

    async def call(stub: pb_grpc.ServiceProviderServiceAsyncStub) -> None:
        nonlocal refused
        while True:
            try:
                await stub.Execute(
                    pb.ExecuteRequest(operations=[sign_operation() for _ in range(8)]), metadata=metadata, timeout=2
                )
            except grpc.aio.AioRpcError:
                refused += 1

    async def stream(stub: pb_grpc.ServiceProviderServiceAsyncStub) -> None:
        stream = stub.ExecuteStream(metadata=metadata)
        number = 0

        async def ask() -> None:
            nonlocal number
            number += 1
            operations = [sign_operation() for _ in range(64)]
            await stream.write(pb.ExecuteStreamRequest(batch_id=number, operations=operations))

        nonlocal refused
        for _ in range(BATCHES):
            await ask()
        while True:
            response = await stream.read()
            if isinstance(response, pb.ExecuteStreamResponse):
                refused += bool(response.failures)
            await ask()

    stop = asyncio.Event()
    for number in (15, 2):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with grpc.aio.secure_channel(told["address"], credentials) as channel:
        stub = pb_grpc.ServiceProviderServiceStub(channel)
        tasks = [asyncio.create_task(call(stub)) for _ in range(CALLERS)] + [asyncio.create_task(stream(stub))]
        await asyncio.sleep(1)
        print("loud", flush=True)
        before = refused
        await stop.wait()
        count = refused - before
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await asyncio.gather(*tasks, return_exceptions=True)
    print(count, flush=True)


if __name__ == "__main__":
    _told = json.loads(Path(sys.argv[1]).read_text())
    _pem = Path(_told["pem"]).read_bytes()
    asyncio.run(_be_loud(_told, grpc.ssl_channel_credentials(Path(_told["authority"]).read_bytes(), _pem, _pem)))
