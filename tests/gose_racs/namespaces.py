"""Hosts for a test: network namespaces (ip-netns(8)) joined by veth pairs, made by the test itself and gone with it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Host:
    """One namespace. ``device`` is its end of the cable to the hub, ``address`` its own."""

    namespace: str
    device: str
    address: str

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """A process on this host."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ("ip", "netns", "exec", self.namespace, *command), stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )

    async def open(self, *command: str, log: Path) -> asyncio.subprocess.Process:
        """A process on this host whose standard output is read."""
        with log.open("ab") as file:
            return await asyncio.create_subprocess_exec(
                *("ip", "netns", "exec", self.namespace, *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
            )

    def cut(self) -> None:
        """Pulls the cable out: nothing arrives, and nobody is told."""
        ip("-n", self.namespace, "link", "set", self.device, "down")

    def join(self) -> None:
        """Puts it back."""
        ip("-n", self.namespace, "link", "set", self.device, "up")


def ip(*arguments: str) -> None:
    """One command of ip(8)."""
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[tuple[Host, list[Host]]]:
    """A hub and so many hosts, each with a cable of its own to the hub. Skips the test where the machine does not allow it."""
    if shutil.which("ip") is None:
        pytest.skip("no ip(8) here: network namespaces need Debian's iproute2")
    run = secrets.token_hex(3)
    names = [f"sf-{run}-hub", *(f"sf-{run}-{number}" for number in range(count))]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
                ip("-n", name, "link", "set", "lo", "up")
            found = [_cable(names[0], name, number) for number, name in enumerate(names[1:])]
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces (root is needed): {error.stderr.strip()}")
        yield Host(names[0], "lo", "127.0.0.1"), found
    finally:
        for name in made:
            ip("netns", "del", name)


def _cable(hub: str, name: str, number: int) -> Host:
    here, there = f"hub{number}", "up0"
    ip("-n", hub, "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
    for namespace, device, last in ((hub, here, 1), (name, there, 2)):
        ip("-n", namespace, "address", "add", f"10.203.{number}.{last}/24", "dev", device)
        ip("-n", namespace, "link", "set", device, "up")
    return Host(name, there, f"10.203.{number}.2")
