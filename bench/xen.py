"""A guest's ways to dom0 on a real Xen host: vchan beside TCP on the bridge, in one run.

First the ways alone, between a program in the guest and one in dom0, both with the project's own ends (so a vchan carries streams, as it
does for gRPC); then a signature through the whole chain over each. Rounds of the two alternate. Under emulation the figures are small:
read the ratios.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.plan import Plan
from bench.rows import Row
from testbed import Host, Testbed
from testbed.guests import Guest, own_domain
from tests.xen.deployment import GRID, HOST, HOSTS, ROOT, deployed_state, make_release
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import Vm

DOM0, PORT = "192.168.77.1", 7999
AGENT_PYTHON, DOM0_PYTHON = "/usr/lib/secfunet/vm-agent/bin/python3", "/opt/secfunet/current/bin/python3"
SETTINGS = "/etc/secfunet/secure-middleware.toml"
UUID = "5ec0f07e-be4c-4bed-8000-000000000001"

# The first byte says what the peer does: "e" echoes 64 bytes again and again, "u" takes 4 MiB and answers with a byte, "d" sends 4 MiB.
IN_DOM0 = f"""
import asyncio, sys
from pathlib import Path
from secfunet.xen.host_end import HostEnd
SIZE = 4 << 20
async def serve(reader, writer):
    try:
        what = await reader.readexactly(1)
        if what == b"e":
            while True:
                writer.write(await reader.readexactly(64))
        elif what == b"u":
            await reader.readexactly(SIZE)
            writer.write(b"k")
        else:
            writer.write(bytes(SIZE))
        await writer.drain()
        writer.close()
    except (asyncio.IncompleteReadError, OSError):
        writer.close()
async def main():
    path = Path("/run/bench.sock")
    path.unlink(missing_ok=True)
    await asyncio.start_unix_server(serve, path, limit=SIZE)
    await asyncio.start_server(serve, "{DOM0}", {PORT}, limit=SIZE)
    end = await HostEnd.serve(int(sys.argv[1]), f"/local/domain/{{sys.argv[1]}}/bench", {{"bench": path}})
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await end.close()
asyncio.run(main())
"""

IN_GUEST = f"""
import asyncio, json, statistics, sys, tempfile, time
from pathlib import Path
from secfunet.xen.guest_end import GuestEnd
from secfunet.xen.vchan import Vchan
SIZE, TRIPS, ROUNDS = 4 << 20, 200, int(sys.argv[1])
async def measure(connect):
    reader, writer = await connect()
    writer.write(b"e")
    times = []
    for _ in range(TRIPS):
        begin = time.perf_counter()
        writer.write(bytes(64))
        await reader.readexactly(64)
        times.append(time.perf_counter() - begin)
    writer.close()
    reader, writer = await connect()
    begin = time.perf_counter()
    writer.write(b"u" + bytes(SIZE))
    await reader.readexactly(1)
    up = time.perf_counter() - begin
    writer.close()
    reader, writer = await connect()
    begin = time.perf_counter()
    writer.write(b"d")
    await reader.readexactly(SIZE)
    down = time.perf_counter() - begin
    writer.close()
    return [statistics.median(times) * 1e3, SIZE / up / 1e6, SIZE / down / 1e6]
async def main():
    found = {{"vchan": [], "tcp": []}}
    with tempfile.TemporaryDirectory() as name:
        async with GuestEnd(Path(name), ("bench",), connect=lambda: Vchan.connect(0, "bench")) as end:
            await end.opened(timeout=60)
            for _ in range(ROUNDS):
                found["vchan"].append(await measure(lambda: asyncio.open_unix_connection(end.socket("bench"), limit=SIZE)))
                found["tcp"].append(await measure(lambda: asyncio.open_connection("{DOM0}", {PORT}, limit=SIZE)))
    print(json.dumps(found))
asyncio.run(main())
"""

SIGN = """
import json, os, statistics, sys, threading, time
from pathlib import Path
from secfunet.gose.v1 import operation_pb2
from vm_agent.client import LocalClient
PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
agent = LocalClient(Path("/run/secfunet/agent.sock"), timeout=120)
for _ in range(5):
    agent.sign(PSS, os.urandom(32))
times = []
for _ in range(int(sys.argv[1])):
    begin = time.perf_counter()
    agent.sign(PSS, os.urandom(32))
    times.append(time.perf_counter() - begin)
def many():
    for _ in range(int(sys.argv[1])):
        agent.sign(PSS, os.urandom(32))
threads = [threading.Thread(target=many) for _ in range(16)]
begin = time.perf_counter()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([statistics.median(times) * 1e3, 16 * int(sys.argv[1]) / (time.perf_counter() - begin)]))
"""


async def measure(plan: Plan) -> None:
    """Six rows: round trip and throughput each way, and a signature alone and sixteen at once."""
    with tempfile.TemporaryDirectory(prefix="sfb-", dir="/tmp") as name:
        work = Path(name)
        release = make_release(ROOT / "dist")
        state = deployed_state(release, work)
        with Testbed.resume("bench", hosts=HOSTS, state=state, guest_disk=release.guest_disk) as bed:
            _ways(plan, bed[HOST])
            _chain(plan, bed, work)


def _ways(plan: Plan, host: Host) -> None:
    host.write("/run/bench.xml", own_domain("bench", UUID, "192.168.77.31", "00:16:3e:be:4c:01", memory_mib=224))
    host.run("virsh -c xen:///system create /run/bench.xml")
    guest = Guest(host, "bench", "192.168.77.31")
    guest.wait_until_ready()
    guest.run("systemctl stop secfunet-vm-agent.service; cat >/run/bench.py", data=IN_GUEST.encode())
    with _in_dom0(host, guest.domain_id):
        found = json.loads(guest.run(f"{AGENT_PYTHON} /run/bench.py {plan.rounds}", timeout=1200).stdout)
    for index, (what, unit) in enumerate(
        (("round trip of 64 bytes", "ms"), ("guest to dom0", "MB/s"), ("dom0 to guest", "MB/s"))
    ):
        rows = {way: Row.of(f"{way}: {what}", unit, [one[index] for one in found[way]]) for way in ("tcp", "vchan")}
        plan.add(rows["tcp"])
        plan.add(rows["vchan"].against(rows["tcp"]))
    guest.hang_up()
    host.run("virsh -c xen:///system destroy bench")


@contextmanager
def _in_dom0(host: Host, domain_id: int) -> Iterator[None]:
    host.write("/run/bench.py", IN_DOM0)
    process = host.start(f"{DOM0_PYTHON} /run/bench.py {domain_id}")
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError((process.communicate()[1]).decode(errors="replace")[-1000:])
        yield
    finally:
        process.communicate(timeout=60)


def _chain(plan: Plan, bed: Testbed, work: Path) -> None:
    """One VM, started anew for each way."""
    host = bed[HOST]
    samples: dict[str, list[list[float]]] = {"vchan": [], "tcp": []}
    with Orchestrator(host, work) as orchestrator:
        vm = Vm.make("web", 21, grid=bed[GRID], host=host, orchestrator=orchestrator, folder=work)
        for way in samples:
            if way == "tcp":
                table = f'kind = "tcp"\\n\\n[channel.tcp]\\naddress = "{DOM0}"'
                host.run(
                    f"""sed -i 's/^kind = "vchan"/{table}/' {SETTINGS}; systemctl restart secure-middleware.service"""
                )
                orchestrator.stop(vm.uuid)
            vm.boot()
            vm.must_work()  # dom0 has enrolled its agent; that has heard of it, too
            vm.guest.run("cat >/run/sign.py", data=SIGN.encode())
            for _ in range(plan.rounds):
                said = vm.guest.run(f"{AGENT_PYTHON} /run/sign.py 5", timeout=1200).stdout
                samples[way].append(json.loads(said))
        vm.guest.hang_up()
    for index, (what, unit) in enumerate((("a signature alone", "ms"), ("signatures, 16 at once", "1/s"))):
        rows = {way: Row.of(f"{way}: {what}", unit, [one[index] for one in samples[way]]) for way in ("tcp", "vchan")}
        plan.add(rows["tcp"])
        plan.add(rows["vchan"].against(rows["tcp"]))
    plan.notes.append(
        f"on Xen under emulation: {statistics.median(one[1] for one in samples['vchan']):.0f} signatures/s; read ratios"
    )
