"""A hypervisor's way to a session: service provider, OpenID discovery and association, login between two secure elements, assertion,
session."""

from __future__ import annotations

import time

from bench.hypervisor import hypervisor_client
from bench.plan import Plan
from bench.rows import Row
from bench.stage import Stage

FULL = "a hypervisor's login, from nothing to a VM's session"
NEXT = "the next session of a hypervisor that is logged in"
DEADLINE = 30.0


async def measure(plan: Plan, stage: Stage) -> None:
    """The first session of a client that has no connection, and the second."""
    stack = await stage.stack()
    full: list[float] = []
    following: list[float] = []
    for _ in range(max(plan.rounds, 3)):
        async with hypervisor_client(stack) as (client, certificate, token):
            for taken in (full, following):
                begin = time.perf_counter()
                await client.open_session(certificate, token, timeout=DEADLINE)
                taken.append((time.perf_counter() - begin) * 1000)
    whole = plan.add(Row.of(FULL, "ms", full))
    plan.add(Row.of(NEXT, "ms", following).against(whole))
