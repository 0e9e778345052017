"""A bridge of dom0 and guests behind it, in network namespaces (ip-netns(8)) that the test makes and removes."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BRIDGE, DOM0 = "xenbr0", "192.168.77.1"
UUID = "11111111-0000-4000-8000-000000000000"
ADDRESSES = {"a": "192.168.77.21", "b": "192.168.77.22"}
MACS = {"a": "00:16:3e:00:00:21", "b": "00:16:3e:00:00:22"}
INTERFACES = {"a": "vif1.0", "b": "vif2.0"}
ROOT = Path(__file__).parents[2]
ATTACKS = ROOT / "tests/xen/attacks"


@dataclass
class Bridge:
    """``name``: what its namespaces' names begin with. ``dom0``: the process of ``bridge_dom0`` there."""

    name: str
    dom0: subprocess.Popen[str]
    port: int

    def ask(self, question: str) -> Any:
        assert self.dom0.stdin is not None
        assert self.dom0.stdout is not None
        self.dom0.stdin.write(question + "\n")
        self.dom0.stdin.flush()
        return json.loads(self.dom0.stdout.readline())

    def start(self, where: str, *command: str) -> subprocess.Popen[str]:
        """A program of Python's on ``where``: dom0, a or b."""
        return _start(self.name, where, *command)

    def tables(self, *command: str) -> str:
        """What a command prints in dom0."""
        done = subprocess.run(
            ("ip", "netns", "exec", f"{self.name}-dom0", *command), check=True, capture_output=True, text=True
        )
        return done.stdout


def _start(name: str, where: str, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ("ip", "netns", "exec", f"{name}-{where}", sys.executable, *command),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


@contextlib.contextmanager
def bridge(folder: Path) -> Iterator[Bridge]:
    """Guest a has a channel; guest b has none, and is the neighbour. Skips where the machine does not allow namespaces."""
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        pytest.skip("no ip(8) or bridge(8) here: they are in Debian's iproute2")
    name = f"sfb{secrets.token_hex(2)}"
    with contextlib.ExitStack() as stack:
        for where in ("dom0", "a", "b"):
            try:
                _ip("netns", "add", f"{name}-{where}")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            stack.callback(_ip, "netns", "del", f"{name}-{where}")
            _ip("-n", f"{name}-{where}", "link", "set", "lo", "up")
        dom0 = f"{name}-dom0"
        _ip("-n", dom0, "link", "add", BRIDGE, "type", "bridge")
        _ip("-n", dom0, "link", "set", BRIDGE, "up")
        _ip("-n", dom0, "address", "add", f"{DOM0}/24", "dev", BRIDGE)
        for guest, interface in INTERFACES.items():
            there = f"{name}-{guest}"
            _ip("-n", dom0, "link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", there)
            _ip("-n", there, "link", "set", "eth0", "address", MACS[guest], "up")
            _ip("-n", there, "address", "add", f"{ADDRESSES[guest]}/24", "dev", "eth0")
            _ip("-n", dom0, "link", "set", interface, "master", BRIDGE, "up")
        process = _start(name, "dom0", "-m", "tests.dom0_middleware.bridge_dom0", str(folder))
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        assert process.stdout is not None
        yield Bridge(name, process, json.loads(process.stdout.readline())["port"])
