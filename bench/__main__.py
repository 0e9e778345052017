"""``python -m bench``: measures everything, prints one table; exit code 1 if a group could not be measured."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench import limits, readers, tandem
from bench.plan import Plan
from bench.rows import table, to_json

GROUPS = ("limits", "readers", "tandem", "login", "chain", "hostile", "load", "memory")
ON_XEN = "xen"  # minutes on a testbed of its own: only if it is asked for


async def _measure(plan: Plan, chosen: list[str]) -> list[str]:
    """Runs the groups; returns a sentence for each that failed. The table has what the others found."""
    from bench.stage import Stage

    problems: list[str] = []

    async def group(name: str, run: Callable[[], Awaitable[None]]) -> None:
        if name not in chosen:
            return
        print(f"... {name}", file=sys.stderr, flush=True)
        try:
            await run()
        except Exception as error:  # noqa: BLE001 - one group that fails must not cost the rows of the others
            problems.append(f"{name}: {type(error).__name__}: {error}")

    async with Stage() as stage:

        async def chain() -> None:
            from bench.chain import measure

            await measure(plan, stage)

        async def hostile() -> None:
            from bench.hostile import measure

            await measure(plan, stage)

        async def login() -> None:
            from bench.login import measure

            await measure(plan, stage)

        async def load() -> None:
            from bench.load import measure

            await measure(plan)

        async def memory() -> None:
            from bench.memory import measure

            await measure(plan, stage)

        async def xen() -> None:
            from bench.xen import measure

            await measure(plan)

        await group("limits", lambda: limits.measure(plan))
        await group("readers", lambda: readers.measure(plan))
        await group("tandem", lambda: tandem.measure(plan))
        await group("login", login)
        await group("chain", chain)
        await group("hostile", hostile)
        await group("load", load)
        await group("memory", memory)  # last: it starts daemons anew
        await group(ON_XEN, xen)
    return problems


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures the whole chain against this machine's limits."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--quick", action="store_true", help="short rounds: to see that everything runs")
    parser.add_argument(
        "--only",
        action="append",
        choices=(*GROUPS, ON_XEN),
        help="only this group (may be repeated; limits always run)",
    )
    arguments = parser.parse_args()
    plan = Plan.quick() if arguments.quick else Plan()
    chosen = ["limits", *(arguments.only or GROUPS)]
    problems = asyncio.run(_measure(plan, chosen))
    rows = list(plan.rows.values())
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    print(f"{machine}; medians of {plan.rounds} rounds")
    print(table(rows, problems))
    for note in plan.notes:
        print(note)
    if arguments.json is not None:
        arguments.json.write_text(to_json(rows, problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
