"""How long handshakes wait for a server card, beside the formula for as many servers with one queue (Erlang C).

Real handshakes arrive at random (Poisson) at a TLS-Tandem listener whose cards lie in one Bank, as at the grid's login page. The cards are
models whose handshakes take a random time with an exponential distribution, as the formula has it (M/M/c), and then exactly as long each
(M/D/c, for which the formula is an upper bound: waiting is about half). Beside them stands what an ideal queue would have made of the very
same arrivals and times: that comparison has no chance in it.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.load_grid import LoadGrid, every
from bench.plan import Plan
from bench.rows import Row
from gose.cards import CardWays
from gose.metrics import Metrics
from gose.settings import Limits
from gose.slots.bank import Bank
from gose.slots.connect import CardConnector
from secfunet.card.client import CardClient
from secfunet.tandem.aio import start_tandem_server
from secfunet.tandem.parameters import TandemParameters

CARDS = 8
SECONDS = 0.25  # a handshake, on average
LOAD = 0.8  # of what the cards can do
PATIENCE = 60.0
SEED = 2014


def erlang_c(servers: int, offered: float) -> float:
    """The probability of having to wait, ``offered`` erlangs (< servers) for so many servers (A. K. Erlang, 1917; ITU-T E.500 series)."""
    if not 0 <= offered < servers:
        raise ValueError("more is offered than the servers can do")
    # By way of Erlang B's recursion, which does not overflow.
    blocking = 1.0
    for number in range(1, servers + 1):
        blocking = offered * blocking / (number + offered * blocking)
    utilisation = offered / servers
    return blocking / (1 - utilisation + utilisation * blocking)


def mean_wait(servers: int, arrivals: float, service: float) -> float:
    """Seconds that an arrival waits on average in M/M/c: ``arrivals`` a second, ``service`` seconds each."""
    return erlang_c(servers, arrivals * service) / (servers / service - arrivals)


def ideal_waits(servers: int, customers: list[tuple[float, float]]) -> list[float]:
    """What an ideal first-come-first-served queue makes each of (arrival, service time) wait, arrivals in order."""
    free = [0.0] * servers
    waits = []
    for arrival, service in customers:
        begin = max(arrival, heapq.heappop(free))
        waits.append(begin - arrival)
        heapq.heappush(free, begin + service)
    return waits


@dataclass
class _Watched:
    """A CardPool that notes when each borrower came, began and ended."""

    bank: Bank

    def __post_init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []
        self.failed = 0  # handshakes

    @asynccontextmanager
    async def lease(self, *, timeout: float) -> AsyncIterator[CardClient]:
        came = time.perf_counter()
        async with self.bank.lease(timeout=timeout) as card:
            began = time.perf_counter()
            try:
                yield card
            finally:
                self.seen.append((came, began, time.perf_counter()))


async def measure(plan: Plan) -> None:
    """Two distributions; one long round each, because waits of neighbours in time are alike."""
    seconds = max(5.0, 45 * plan.seconds)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        async with LoadGrid(Path(folder), vms=0, servers=CARDS) as load:
            for distribution in ("exponential", "constant"):
                latency = {"handshake": SECONDS, "command": 0.0, "distribution": distribution}
                await load.start_cards(every(load.servers, latency))
                try:
                    watched = await _handshakes(load, seconds)
                finally:
                    await load.stop()
                _add(plan, distribution, watched.seen)
                if watched.failed:
                    plan.notes.append(
                        f"{watched.failed} handshakes failed ({distribution} times): read those rows with care"
                    )


def _add(plan: Plan, distribution: str, seen: list[tuple[float, float, float]]) -> None:
    seen = sorted(seen)
    waits = [began - came for came, began, _ in seen]
    service = [ended - began for _, began, ended in seen]
    mean_service = sum(service) / len(service)
    arrivals = (len(seen) - 1) / (seen[-1][0] - seen[0][0])
    offered = arrivals * mean_service / CARDS
    name = f"{CARDS} server cards, {distribution} times"
    plan.add(Row.of(f"handshakes measured, {name}, load {offered:.2f}", "", [float(len(seen))]))
    mean = [1000 * sum(waits) / len(waits)]
    ideal = ideal_waits(CARDS, [(came, spent) for (came, _, _), spent in zip(seen, service, strict=True)])
    theirs = plan.add(
        Row.of(f"mean wait in an ideal queue, same arrivals and times, {name}", "ms", [1000 * sum(ideal) / len(ideal)])
    )
    plan.add(Row.of(f"mean wait for a card, {name}", "ms", mean).against(theirs))
    if offered < 1:
        formula = 1000 * mean_wait(CARDS, arrivals, mean_service)
        erlang = plan.add(Row.of(f"mean wait by Erlang C, {name}", "ms", [formula]))
        plan.add(Row.of(f"mean wait for a card, beside Erlang C, {name}", "ms", mean).against(erlang))


async def _handshakes(load: LoadGrid, seconds: float) -> _Watched:
    limits = Limits(server_card_timeout=PATIENCE, handshake_timeout=PATIENCE)
    elements = [load.grid.settings.secure_element(name) for name in load.servers]
    ways = CardWays.of(load.grid.settings)
    bank = Bank(
        "server cards",
        [(one.seid, CardConnector(one, limits, ways)) for one in elements if one is not None],
        limits,
        Metrics(),
    )
    await bank.start()
    watched = _Watched(bank)
    context = load.grid.hypervisor("hv-0").context(load.grid.authority.ca_path)
    chance = random.Random(SEED)  # noqa: S311 - arrivals, no secrets
    parameters = TandemParameters(patience=PATIENCE)
    server = await start_tandem_server(
        asyncio.Protocol,
        watched,
        host="127.0.0.1",
        port=0,
        parameters=parameters,
        handshake_timeout=PATIENCE,
        max_handshakes=4096,
    )
    try:
        async with server, asyncio.TaskGroup() as group:
            port = server.sockets[0].getsockname()[1]
            until = time.perf_counter() + seconds
            due = time.perf_counter()
            while due < until:
                due += chance.expovariate(LOAD * CARDS / SECONDS)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(_connect(port, context, watched))
    finally:
        await bank.close()
    return watched


async def _connect(port: int, context: ssl.SSLContext, watched: _Watched) -> None:
    try:
        _, writer = await asyncio.open_connection(
            "localhost", port, ssl=context, server_hostname="localhost", ssl_handshake_timeout=PATIENCE
        )
    except OSError:  # ssl.SSLError is one
        watched.failed += 1
        return
    writer.transport.abort()
