"""A grid under load, with cards as slow as those of hardware: see ``LEGEND``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil

from bench import neighbour, waiting
from bench.driver import Driver
from bench.load_grid import LoadGrid, every
from bench.plan import Plan
from bench.rows import Row
from tests.support.cards import running_card

SIZES = (1, 4, 16, 64, 256)
QUICK_SIZES = (1, 4, 16)
AIMS = {64: 0.97, 256: 0.90}
CARD_SECONDS = 0.35
DEPTH = 3  # batches of one operation that each VM has in flight: its card always has a next one
LEGEND = f"""\
Model cards ([benchmark_latency]): a private-key operation takes T = {CARD_SECONDS} s. N cards can do N / T operations a second, whatever
the grid does; each VM has {DEPTH} batches of one operation in flight, so no card is out of work. Every answer is verified. Many model cards
share a process, which computes their signatures on this machine's cores, as cards of hardware would not."""


async def measure(plan: Plan) -> None:
    """Throughput by the number of cards, memory, waiting for server cards, and a VM beside one that floods."""
    plan.notes.append(LEGEND)
    plan.notes.append(_how_calm())
    sizes = SIZES if plan.seconds >= 1 else QUICK_SIZES
    seconds = max(2.0, 4 * plan.seconds)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        async with LoadGrid(Path(folder), vms=max(sizes), processes=1) as load:
            await load.start(every(load.vms, {"private_key": CARD_SECONDS}))
            async with Driver(load) as driver:
                await driver.log_in(load.vms)
                for size in sizes:
                    await _throughput(plan, load, driver, size, seconds)
            await _memory(plan, load, max(sizes))
            await neighbour.measure(plan, load, Path(folder))
    await waiting.measure(plan)
    plan.notes.append(_how_calm())


async def _throughput(plan: Plan, load: LoadGrid, driver: Driver, size: int, seconds: float) -> None:
    ideal = size / CARD_SECONDS
    limit = plan.add(Row.of(f"limit of {size} model card{'s' * (size > 1)}: N / T", "1/s", [ideal]))
    rates, busy = [], []
    for _ in range(min(plan.rounds, 3)):
        before = load.processor_time()
        answers = await driver.sign(load.vms[:size], seconds=seconds, depth=DEPTH)
        after = load.processor_time()
        busy.append((after["the grid"] - before["the grid"]) / seconds)
        rates.append(sum(one.rate() for one in answers))
        driver.check(answers)
    row = Row.of(f"signatures of {size} model card{'s' * (size > 1)} through the grid", "1/s", rates).against(limit)
    plan.add(row.at_least(AIMS[size]) if size in AIMS else row)
    plan.add(Row.of(f"  processor time of the grid, {size} cards at work", "cores", busy))


async def _memory(plan: Plan, load: LoadGrid, size: int) -> None:
    """What a card costs as a process of its own, and as one of many in a process."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with running_card(Path(folder)) as card:
            assert card.process is not None
            alone = psutil.Process(card.process.pid).memory_full_info()
    own = plan.add(Row.of("memory of a card that is a process (its own pages)", "MiB", [alone.uss / 2**20]))
    plan.add(Row.of(f"memory of a model card, {size} in a process", "MiB", [load.memory() / size]).against(own))


def _how_calm() -> str:
    return f"load average of the machine: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"
