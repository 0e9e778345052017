"""dom0's channel of kind tcp in a network namespace that has a bridge: what ``test_bridge`` runs there.

The tables are the kernel's. Only xenstore's part, which interfaces a domain has, is given. A line of standard input is a question:
``facts`` (seconds that a look at the domain's facts takes), ``refused`` (what was refused, and lines of the log), ``close`` (the run ends).
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import statistics
import sys
import time
from pathlib import Path

from dom0_middleware.channels import interfaces, tcp
from dom0_middleware.channels.port import ChannelDomain
from tests.dom0_middleware.bridge import ADDRESSES, BRIDGE, DOM0, MACS, UUID


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class NoJoin:
    def domain(self, *_: object) -> None: ...

    def forget(self, *_: object) -> None: ...

    async def erase(self, *_: object) -> None: ...


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        writer.write(data)
        await writer.drain()
    writer.close()


async def main(folder: Path) -> None:
    refused = 0

    def count(_uuid: str, _why: str) -> None:
        nonlocal refused
        refused += 1

    channel = tcp.TcpChannel(
        folder, address=DOM0, bridge=BRIDGE, ports=range(7000, 7010), refused=count, check_interval=0.5
    )
    found = await channel.open(ChannelDomain(UUID, 1, ADDRESSES["a"]))
    await asyncio.start_unix_server(echo, found.agent.removeprefix("unix:"))
    say(json.dumps({"port": int(found.guest_agent.rpartition(":")[2])}))
    while question := (await asyncio.to_thread(sys.stdin.readline)).strip():
        answer: object = None
        if question == "facts":
            times = []
            for _ in range(9):
                begin = time.perf_counter()
                await interfaces.read_facts(1, ADDRESSES["a"], BRIDGE)
                times.append(time.perf_counter() - begin)
            answer = statistics.median(times)
        elif question == "refused":
            answer = {"refused": refused, "lines": LOG.getvalue().splitlines(), "state": channel.status(UUID).state}
        elif question == "close":
            await channel.close(UUID)
        say(json.dumps(answer))


LOG = io.StringIO()
logging.basicConfig(stream=LOG, level=logging.INFO)
interfaces._back_ends = lambda domain_id: {f"vif{domain_id}.0": MACS["a"]}
tcp.XenstoreJoin = NoJoin  # type: ignore[assignment, misc]
asyncio.run(main(Path(sys.argv[1])))
