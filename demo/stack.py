"""A whole installation, made once and started as often as one likes: every component a process of its own.

::

    async with Stack(folder, vms=("web",)) as stack:
        stack.agent_socket("web")

Making it takes some seconds (key pairs are generated inside the cards); starting an installation that exists is a matter of two.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.installation import (
    Layout,
    Ports,
    load_ports,
    save_ports,
    write_agent,
    write_card,
    write_grid,
    write_middleware,
)
from demo.processes import Daemon, ProcessError, run
from secfunet.service.files import private_folder

Report = Callable[[str], None]


class Stack:
    """Cards, grid, hosts and VMs of one installation.

    ``vms`` run on the first of ``hypervisors``; the others are hosts of the same grid whose middleware is started only by ``start_host``.
    ``key`` is the algorithm of the VMs' keys. ``report`` is told each step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vms: Sequence[str] = ("web",),
        hypervisors: Sequence[str] = ("xen-1",),
        server_cards: int = 2,
        key: str = "rsa-2048",
        report: Report = lambda _: None,
    ) -> None:
        self.layout = Layout(folder)
        self.vms = tuple(vms)
        self.hypervisors = tuple(hypervisors)
        self.servers = tuple(f"op-{number}" for number in range(1, server_cards + 1))
        self.key = key
        self.daemons: dict[str, Daemon] = {}
        self.made = False
        self._report = report

    # What a caller wants to know

    @property
    def host(self) -> str:
        """The host on which the VMs run."""
        return self.hypervisors[0]

    def agent_socket(self, vm: str) -> Path:
        """Where the programs of ``vm`` reach their agent."""
        return self.layout.agent_socket(vm)

    @property
    def ports(self) -> Ports:
        """Where the grid listens."""
        ports = load_ports(self.layout)
        if ports is None:
            raise ProcessError("installation", "is not complete", "")
        return ports

    # Life

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Makes the installation if its folder has none (or another one), then starts everything."""
        await self._prepare()
        cards = self._cards()
        self._report(f"{len(cards)} secure elements, a process each")
        await asyncio.gather(
            *(self._start(f"card-{card}", "secure-element", "serve", self._card_config(card)) for card in cards)
        )
        if not self.made:
            await self._make()
        await asyncio.gather(*(self._issue(vm, self.host) for vm in self.vms))
        self._report("the grid: service provider and OpenID provider")
        await self._start("gose", "gose", "serve", self.layout.gose_config)
        self._report(f"the Secure Middleware of {self.host}")
        await self.start_host(self.host)
        for vm in self.vms:
            self._report(f"the VM {vm} and its agent")
            await self.start_vm(vm)

    async def stop(self) -> None:
        """Stops every process, the ones above first. Raises ProcessError if one did not end cleanly."""
        failed = []
        for level in ("agent-", "middleware-", "gose", "card-"):
            chosen = [daemon for name, daemon in self.daemons.items() if name.startswith(level) and daemon.running]
            codes = await asyncio.gather(*(daemon.stop() for daemon in chosen))
            failed += [(daemon, code) for daemon, code in zip(chosen, codes, strict=True) if code != 0]
        if failed:
            daemon, code = failed[0]
            raise ProcessError(daemon.name, f"ended with {code} at SIGTERM", daemon.log.read_text(errors="replace"))

    async def start_host(self, hypervisor: str) -> None:
        """Starts the Secure Middleware of a host."""
        config = self.layout.middleware_config(hypervisor)
        await self._start(f"middleware-{hypervisor}", "secure-middleware", "serve", config)

    async def start_vm(self, vm: str) -> None:
        """Creates the VM if need be, starts its domain and the agent in it."""
        known = json.loads((await self.middleware("vm", "list", "--json")).decode())
        if vm not in {entry["name"] for entry in known}:
            await self.middleware("vm", "create", "--name", vm, "--certificate", self.layout.certificate(vm))
        token = self.layout.token(vm, self.host)
        started = json.loads(await self.middleware("vm", "start", vm, "--token-file", token, "--json"))
        # The guest is a process here: dom0 hands it the folder that a domain would find on its channel.
        config = write_agent(self.layout, vm, Path(started["guest_channel"]) / "join.json")
        await self._start(f"agent-{vm}", "vm-agent", "serve", config)

    # Commands, as a user types them

    async def middleware(self, *words: str | Path, host: str | None = None) -> bytes:
        """``secure-middleware``; returns what it printed."""
        config = self.layout.middleware_config(host or self.host)
        return (await run("secure-middleware", *words, "--config", config)).output

    async def gose(self, *words: str | Path) -> bytes:
        """``gose``; returns what it printed."""
        return (await run("gose", *words, "--config", self.layout.gose_config, timeout=120)).output

    async def agent(self, vm: str, *words: str | Path, input_data: bytes | None = None) -> bytes:
        """``vm-agent`` inside ``vm``; returns what it printed."""
        config = self.layout.agent_config(vm)
        return (await run("vm-agent", *words, "--config", config, input_data=input_data)).output

    # The parts

    def _cards(self) -> list[str]:
        return [*self.hypervisors, *self.servers, *self.vms]

    def _card_config(self, card: str) -> Path:
        return self.layout.card(card) / "secure-element.toml"

    def _plan(self) -> str:
        """What this installation is to be: another plan needs another installation."""
        plan = json.dumps([self.vms, self.hypervisors, self.servers, self.key])
        return hashlib.sha256(plan.encode()).hexdigest()

    async def _prepare(self) -> None:
        folder = self.layout.folder
        plan = folder / "plan"
        self.made = plan.exists() and plan.read_text() == self._plan() and load_ports(self.layout) is not None
        if self.made:
            return
        if folder.exists():
            shutil.rmtree(folder)
        private_folder(folder)
        self.layout.make()
        self._report("new installation: settings and secrets")
        for card in self._cards():
            config = write_card(self.layout, card)
            pins = config.parent
            words = ("--user-pin-file", pins / "user.pin", "--operator-pin-file", pins / "operator.pin")
            await run("secure-element", "init", "--config", config, *words)
        ports = Ports.free()
        write_grid(
            self.layout, ports, [*((name, "server") for name in self.servers), *((name, "vm") for name in self.vms)]
        )
        for hypervisor in self.hypervisors:
            write_middleware(self.layout, hypervisor, hypervisor, ports)
        save_ports(self.layout, ports)

    async def _make(self) -> None:
        """Authority, enrolment, initial state of the hosts; the plan is written last, so that a half-made folder is made anew."""
        self._report("the authority, and a TLS-Id for every card: key pairs are generated inside the cards")
        await self.gose("init")
        for server in self.servers:
            await self.gose("enrol-server", server, "--seid", server)
        for hypervisor in self.hypervisors:
            pin = self.layout.card(hypervisor) / "operator.pin"
            words = ("--card", self.layout.card_socket(hypervisor), "--operator-pin-file", pin)
            await self.gose("enrol-hypervisor", hypervisor, *words, "--out", self.layout.certificate(hypervisor))
        for vm in self.vms:
            await self.gose("enrol-vm", vm, "--seid", vm, "--key", self.key, "--out", self.layout.certificate(vm))
        for hypervisor in self.hypervisors:
            await self.middleware("init", host=hypervisor)
        (self.layout.folder / "plan").write_text(self._plan())
        self.made = True

    async def _issue(self, vm: str, hypervisor: str) -> None:
        token = self.layout.token(vm, hypervisor)
        token.unlink(missing_ok=True)
        await self.gose("issue-token", "--vm", vm, "--hypervisor", hypervisor, "--out", token)

    async def _start(self, name: str, command: str, verb: str, config: Path) -> None:
        daemon = Daemon(name, (command, verb, "--config", config), self.layout.log(name))
        self.daemons[name] = daemon
        await daemon.start()
