"""Resident memory: what a VM costs its host and the grid when it begins to use its key, and what an agent needs in the VM."""

from __future__ import annotations

import asyncio

import psutil

from bench.plan import Plan
from bench.rows import Row
from bench.stage import Stage

SHARED = {
    "memory added by a VM's session, Secure Middleware": "middleware-",
    "memory added by a VM's session, grid": "gose",
}


async def measure(plan: Plan, stage: Stage) -> None:
    """The VMs of the installation begin one after the other; the first one is warm already or counts as the warm-up."""
    stack = await stage.stack()
    processes = {
        name: [psutil.Process(daemon.pid) for key, daemon in stack.daemons.items() if key.startswith(prefix)]
        for name, prefix in SHARED.items()
    }

    async def resident() -> dict[str, float]:
        await asyncio.sleep(0.3)
        return {name: sum(process.memory_info().rss for process in chosen) / 1024 for name, chosen in processes.items()}

    await stack.agent(stack.vms[0], "sign", "-", input_data=b"warm")
    added: dict[str, list[float]] = {name: [] for name in SHARED}
    before = await resident()
    for vm in stack.vms[1:]:
        for _ in range(5):
            await stack.agent(vm, "sign", "-", input_data=b"first")
        after = await resident()
        for name, taken in added.items():
            taken.append(after[name] - before[name])
        before = after
    for name, taken in added.items():
        plan.add(Row.of(name, "KiB", taken))
    agents = [psutil.Process(stack.daemons[f"agent-{vm}"].pid).memory_info().rss / (1 << 20) for vm in stack.vms[1:]]
    plan.add(Row.of("memory of an agent that is idle", "MiB", agents).below(60))
