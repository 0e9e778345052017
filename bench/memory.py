"""Resident memory: what a VM costs its host and the grid when it begins to use its key, and what an agent needs in the VM."""

from __future__ import annotations

import asyncio

import psutil

from bench.plan import Plan
from bench.rows import Row
from bench.stage import Stage

SHARED = {
    "memory added by a running VM with a session, Secure Middleware": "middleware-",
    "memory added by a VM's session, grid": "gose",
}


async def measure(plan: Plan, stage: Stage) -> None:
    """Grid and middleware are started anew; then the VMs are started one after the other, the first one to warm up."""
    stack = await stage.stack()
    shared = [stack.daemons[name] for name in stack.daemons if name.startswith(tuple(SHARED.values()))]
    for daemon in [*(stack.daemons[f"agent-{vm}"] for vm in stack.vms), *reversed(shared)]:
        await daemon.stop()
    for daemon in shared:
        await daemon.start()
    processes = {
        name: [psutil.Process(daemon.pid) for daemon in shared if daemon.name.startswith(prefix)]
        for name, prefix in SHARED.items()
    }

    async def resident() -> dict[str, float]:
        await asyncio.sleep(0.3)
        return {name: sum(process.memory_info().rss for process in chosen) / 1024 for name, chosen in processes.items()}

    added: dict[str, list[float]] = {name: [] for name in SHARED}
    before: dict[str, float] = {}
    for vm in stack.vms:
        await stack.start_vm(vm)
        for _ in range(5):
            await stack.agent(vm, "sign", "-", input_data=b"first")
        after = await resident()
        for name, taken in added.items():
            if before:
                taken.append(after[name] - before[name])
        before = after
    for name, taken in added.items():
        plan.add(Row.of(name, "KiB", taken))
    agents = [psutil.Process(stack.daemons[f"agent-{vm}"].pid).memory_info().rss / (1 << 20) for vm in stack.vms]
    plan.add(Row.of("memory of an agent that is idle", "MiB", agents).below(60))
