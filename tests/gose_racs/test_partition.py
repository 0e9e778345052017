"""A grid and two nodes on hosts of their own; one host is cut off in the middle of an operation, and joined again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gose_racs.namespaces import Host, hosts
from tests.gose_racs.remote import RemoteGrid, new_remote_grid

pytestmark = pytest.mark.e2e

OPERATION_TIMEOUT = 5.0
NODE = """
listen = "{address}:7777"
key = "{name}.key"
certificate = "{name}.pem"
authority = "ca.pem"
secure_elements = [{{ seid = "{seid}", socket = "{seid}.sock" }}]
[limits]
dead_peer_timeout = 3
[[users]]
name = "grid-a"
[[users.grants]]
secure_elements = ["{seid}"]
allow = ["operate"]
"""
GRID = """
state = "state"
names = ["localhost", "127.0.0.1"]
[service_provider]
https = "{settings.service_provider.https}"
grpc = "{settings.service_provider.grpc}"
[openid_provider]
endpoint = "{settings.openid_provider.endpoint}"
login = "{settings.openid_provider.login}"
[racs]
key = "grid-a-node.key"
certificate = "grid-a-node.pem"
dead_peer_timeout = 2
[limits]
operation_timeout = {timeout}
card_connect_timeout = 5
card_backoff_max = 0.5
watchdog_interval = 1
watchdog_timeout = 5
"""


class Signer:
    """What the hypervisor's process says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: deque[dict[str, Any]] = deque()

    async def until(self, condition: Callable[[dict[str, Any]], bool], timeout: float = 120.0) -> list[dict[str, Any]]:
        """What it says up to the first line of that kind."""
        assert self.process.stdout is not None
        heard: list[dict[str, Any]] = []
        async with asyncio.timeout(timeout):
            while not heard or not condition(heard[-1]):
                line = await self.process.stdout.readline()
                assert line, "the hypervisor's process has ended"
                heard.append(json.loads(line))
        return heard


def saw(vm: str, event: str) -> Callable[[dict[str, Any]], bool]:
    return lambda entry: entry["vm"] == vm and entry["event"] == event


def write_settings(folder: Path, world: RemoteGrid, nodes: dict[str, Host]) -> None:
    settings = world.grid.settings
    text = GRID.format(settings=settings, timeout=OPERATION_TIMEOUT)
    for element in settings.secure_elements:
        text += f'[[secure_elements]]\nseid = "{element.seid}"\nrole = "{element.role}"\n'
        text += f'user_pin_file = "{element.user_pin_file}"\n'
        if element.racs is None:
            text += f'socket = "{element.socket}"\n'
        else:
            host = nodes[element.racs.seid or ""]
            text += f'racs = {{ address = "{host.address}:7777", seid = "{element.racs.seid}" }}\n'
    (folder / "gose.toml").write_text(text)
    for seid, host in nodes.items():
        key, certificate = world.node.credentials(f"node-{seid}", hosts=(host.address,))
        name = key.stem
        assert certificate.stem == name
        (folder / f"{seid}.racs.toml").write_text(NODE.format(address=host.address, name=name, seid=seid))


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)


async def logged(log: Path, message: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while message not in (text := text_of(log)):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        await asyncio.sleep(0.05)


def text_of(log: Path) -> str:
    return log.read_text()


@pytest.mark.timeout(500)
async def test_a_node_is_cut_off_in_the_middle_of_an_operation(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    python = (sys.executable, "-m")
    with hosts(2) as (hub, (first, second)):
        async with new_remote_grid(folder, {"vm-a": "vm", "vm-b": "vm"}) as world, contextlib.AsyncExitStack() as stack:
            world.grid.hypervisor("hv-a")
            write_settings(folder, world, {"vm-a": first, "vm-b": second})
            running = {}
            for name, host, command, ready in (
                ("vm-a", first, ("racs", "serve", "--config", str(folder / "vm-a.racs.toml")), "the node is ready"),
                ("vm-b", second, ("racs", "serve", "--config", str(folder / "vm-b.racs.toml")), "the node is ready"),
                ("grid", hub, ("serve", "--config", str(folder / "gose.toml")), "the grid is ready"),
            ):
                log = folder / f"{name}.serve.log"
                process = host.start(*python, "gose.cli", *command, log=log)
                running[name] = stack.enter_context(ending(process))
                await logged(log, ready, process)
            process = await hub.open(
                *python, "tests.gose_racs.signer", str(folder / "gose.toml"), "vm-a", "vm-b", log=folder / "signer.log"
            )
            signer = Signer(process)
            try:
                await _cut_and_join(signer, second, world)
            except BaseException:
                for log in folder.glob("*.log"):
                    sys.stderr.write(f"--- {log.name}\n{log.read_text()[-4000:]}\n")
                raise
            finally:
                assert process.stdin is not None
                process.stdin.close()
                await process.wait()
            # Nobody was restarted, and nobody is surprised.
            assert all(process.poll() is None for process in running.values())
            assert "exception" not in "".join(log.read_text() for log in folder.glob("*.serve.log"))


async def _cut_and_join(signer: Signer, cut: Host, world: RemoteGrid) -> None:
    await signer.until(saw("vm-a", "signed"))
    await signer.until(saw("vm-b", "signed"))
    card = world.node.cards["vm-b"].process
    assert card is not None
    # The operation is at the node, and its answer will find no way back.
    card.send_signal(signal.SIGSTOP)
    try:
        await signer.until(saw("vm-b", "asks"))
        await asyncio.sleep(0.5)
        cut.cut()
    finally:
        card.send_signal(signal.SIGCONT)
    during = await signer.until(saw("vm-b", "failed"))
    assert not [entry for entry in during if saw("vm-b", "signed")(entry)]
    assert during[-1]["reason"] == "CARD_UNAVAILABLE"
    assert during[-1]["took"] < 3 * OPERATION_TIMEOUT
    # The rest goes on at its speed for as long as it lasts, and what is asked of the cut card is refused early.
    started = time.monotonic()
    during += await signer.until(lambda entry: time.monotonic() > started + 8)
    others = [entry for entry in during if entry["vm"] == "vm-a" and entry["event"] != "asks"]
    assert len(others) > 3
    assert {entry["event"] for entry in others} == {"signed"}
    assert max(entry["took"] for entry in others) < OPERATION_TIMEOUT
    refused = [entry for entry in during if entry["vm"] == "vm-b" and entry["event"] != "asks"]
    assert {(entry["event"], entry["reason"]) for entry in refused} == {("failed", "CARD_UNAVAILABLE")}
    assert len(refused) > 1
    # It returns to service by itself.
    cut.join()
    await signer.until(saw("vm-b", "signed"), timeout=120)
    after = await signer.until(saw("vm-b", "signed"))
    assert not [entry for entry in after if entry["event"] == "failed"]
