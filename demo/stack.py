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
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from demo import installation
from demo.installation import (
    Layout,
    Ports,
    load_ports,
    load_reader_ports,
    save_ports,
    save_reader_ports,
    write_agent,
    write_card,
    write_grid,
    write_middleware,
)
from demo.processes import Daemon, ProcessError, run
from demo.readers import Pcscd, VirtualReader, await_card, free_ports, virtual_readers
from secfunet.card.place import CardPlace
from secfunet.errors import SecFuNetError
from secfunet.service.files import private_folder
from secfunet.service.lock import LockHeldError, process_lock

FRESH_TOKEN = 4 * 3600  # seconds; a token is good for eight hours
Report = Callable[[str], None]
CardKind = Literal["socket", "pcsc"]


class FolderInUseError(SecFuNetError):
    """Another process runs an installation in this folder."""

    def __init__(self, folder: Path, pid: int | None) -> None:
        holder = "" if pid is None else f" (pid {pid})"
        super().__init__(f"an installation runs in {folder} already{holder}: end it first, or name another folder")
        self.folder = folder


class Stack:
    """Cards, grid, hosts and VMs of one installation.

    ``vms`` run on the first of ``hypervisors``; the others are hosts of the same grid whose middleware is started only by ``start_host``.
    ``key`` is the algorithm of the VMs' keys, ``profile`` that of containers. ``cards`` says how cards are reached: each at a "socket"
    of its own, or all in virtual readers of pcscd daemons ("pcsc"). VMs in ``elsewhere`` have a card and a certificate, and run on none of
    the hosts: a program that is a hypervisor of its own takes them. ``report`` is told each step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vms: Sequence[str] = ("web",),
        hypervisors: Sequence[str] = ("xen-1",),
        server_cards: int = 2,
        key: str = "rsa-2048",
        profile: str = "oaep-pss-sha256",
        cards: CardKind = "socket",
        elsewhere: Sequence[str] = (),
        report: Report = lambda _: None,
    ) -> None:
        self.layout = Layout(folder)
        self.vms = tuple(vms)
        self.elsewhere = tuple(elsewhere)
        self.hypervisors = tuple(hypervisors)
        self.servers = tuple(f"op-{number}" for number in range(1, server_cards + 1))
        self.key = key
        self.profile = profile
        self.cards = cards
        self.daemons: dict[str, Daemon] = {}
        self.pcscds: list[Pcscd] = []
        self._readers: dict[str, VirtualReader] = {}
        self.made = False
        self._held = ExitStack()
        self._report = report

    # What a caller wants to know

    @property
    def host(self) -> str:
        """The host on which the VMs run."""
        return self.hypervisors[0]

    def agent_socket(self, vm: str) -> Path:
        """Where the programs of ``vm`` reach their agent."""
        return self.layout.agent_socket(vm)

    def place(self, card: str) -> CardPlace:
        """Where programs find a card."""
        reader = self._readers.get(card)
        return self.layout.card_socket(card) if reader is None else reader.place

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
        """Makes the installation if its folder has none (or another one), then starts everything.

        Raises FolderInUseError, and touches nothing, if another process runs an installation in this folder.
        """
        self._hold()
        await self._prepare()
        cards = self._cards()
        if self.pcscds:
            self._report(f"{len(self.pcscds)} pcscd of our own, with {len(self._readers)} virtual readers")
            await asyncio.gather(*(pcscd.start() for pcscd in self.pcscds))
        self._report(f"{len(cards)} secure elements, a process each")
        await asyncio.gather(
            *(self._start(f"card-{card}", "secure-element", "serve", self._card_config(card)) for card in cards)
        )
        await asyncio.gather(*(await_card(reader.place) for reader in self._readers.values()))
        if not self.made:
            await self._make()
        self._report(f"the grid, the Secure Middleware of {self.host}, a VM-Auth-Token for each VM")
        await asyncio.gather(
            self._start("gose", "gose", "serve", self.layout.gose_config),
            self.start_host(self.host),
            *(self._issue(vm, self.host) for vm in self.vms),
        )
        self._report("the VMs " + " and ".join(self.vms) + ", an agent in each")
        await asyncio.gather(*(self._create_and_start(vm) for vm in self.vms))

    async def stop(self) -> None:
        """Stops every process, the ones above first. Raises ProcessError if one did not end cleanly."""
        try:
            await self._stop()
        finally:
            self._held.close()

    async def _stop(self) -> None:
        failed = []
        for level in ("agent-", "middleware-", "gose", "card-"):
            chosen = [daemon for name, daemon in self.daemons.items() if name.startswith(level) and daemon.running]
            codes = await asyncio.gather(*(daemon.stop() for daemon in chosen))
            failed += [(daemon, code) for daemon, code in zip(chosen, codes, strict=True) if code != 0]
        await asyncio.gather(*(pcscd.stop() for pcscd in self.pcscds))
        if failed:
            daemon, code = failed[0]
            raise ProcessError(daemon.name, f"ended with {code} at SIGTERM", daemon.log.read_text(errors="replace"))

    async def start_host(self, hypervisor: str) -> None:
        """Starts the Secure Middleware of a host."""
        config = self.layout.middleware_config(hypervisor)
        await self._start(f"middleware-{hypervisor}", "secure-middleware", "serve", config)

    async def start_vm(self, vm: str) -> None:
        """Starts the domain of a VM that exists, and the agent in it."""
        token = self.layout.token(vm, self.host)
        started = json.loads(await self.middleware("vm", "start", vm, "--token-file", token, "--json"))
        # The guest is a process here: dom0 hands it the folder that a domain would find on its channel.
        config = write_agent(self.layout, vm, Path(started["guest_channel"]) / "join.json", self.profile)
        await self._start(f"agent-{vm}", "vm-agent", "serve", config)

    def forget(self) -> None:
        """The next start makes a new installation in this folder."""
        (self.layout.folder / "plan").unlink(missing_ok=True)

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

    def _hold(self) -> None:
        """Until ``stop``, no other process makes, starts or removes an installation here. The lock lies beside the folder."""
        folder = self.layout.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(process_lock(folder.with_name(f"{folder.name}.lock")))
        except LockHeldError as error:
            raise FolderInUseError(folder, error.pid) from None

    def _cards(self) -> list[str]:
        return [*self.hypervisors, *self.servers, *self.vms, *self.elsewhere]

    def _card_config(self, card: str) -> Path:
        return self.layout.card(card) / "secure-element.toml"

    def _plan(self) -> str:
        """What this installation is to be: another plan needs another installation."""
        plan = json.dumps(
            [self.vms, self.elsewhere, self.hypervisors, self.servers, self.key, self.profile, self.cards]
        )
        code = Path(installation.__file__).read_bytes()  # what another version made may not fit this one
        return hashlib.sha256(plan.encode() + code).hexdigest()

    async def _prepare(self) -> None:
        folder = self.layout.folder
        plan = folder / "plan"
        self.made = plan.exists() and plan.read_text() == self._plan() and load_ports(self.layout) is not None
        if self.made:
            self._lay_out_readers()
            return
        if folder.exists():
            shutil.rmtree(folder)
        private_folder(folder)
        self.layout.make()
        self._report("new installation: settings and secrets")
        if self.cards == "pcsc":
            save_reader_ports(self.layout, free_ports(len(self._cards())))
        self._lay_out_readers()
        await asyncio.gather(*(self._make_card(card) for card in self._cards()))
        ports = Ports.free()
        roles = [*((name, "server") for name in self.servers), *((name, "vm") for name in (*self.vms, *self.elsewhere))]
        cards = [(name, role, self.place(name)) for name, role in roles]
        write_grid(self.layout, ports, cards, self.profile)
        for hypervisor in self.hypervisors:
            write_middleware(self.layout, hypervisor, self.place(hypervisor), ports, self.profile)
        save_ports(self.layout, ports)

    def _lay_out_readers(self) -> None:
        if self.cards != "pcsc":
            return
        folder, logs = self.layout.folder / "readers", self.layout.folder / "logs"
        self.pcscds = virtual_readers(folder, load_reader_ports(self.layout), logs)
        readers = [reader for pcscd in self.pcscds for reader in pcscd.readers]
        self._readers = dict(zip(self._cards(), readers, strict=True))

    async def _make_card(self, card: str) -> None:
        config = write_card(self.layout, card, reader=self._readers.get(card))
        await run("secure-element", "init", "--config", config, "--user-pin-file", config.parent / "user.pin")

    async def _make(self) -> None:
        """Authority, enrolment, initial state of the hosts; the plan is written last, so that a half-made folder is made anew."""
        self._report("the authority, and a TLS-Id for every card: key pairs are generated inside the cards")
        await self.gose("init")
        await asyncio.gather(
            *(self.gose("enrol-server", server, "--seid", server) for server in self.servers),
            *(self._enrol_hypervisor(hypervisor) for hypervisor in self.hypervisors),
            *(
                self.gose("enrol-vm", vm, "--seid", vm, "--key", self.key, "--out", self.layout.certificate(vm))
                for vm in (*self.vms, *self.elsewhere)
            ),
            *(self.middleware("init", host=hypervisor) for hypervisor in self.hypervisors),
        )
        (self.layout.folder / "plan").write_text(self._plan())
        self.made = True

    async def _enrol_hypervisor(self, name: str) -> None:
        keys = self.layout.card(name) / "card.keys"
        words = ("--card", str(self.place(name)), "--administrator-keys-file", keys)
        await self.gose("enrol-hypervisor", name, *words, "--out", self.layout.certificate(name))

    async def _create_and_start(self, vm: str) -> None:
        created = self.layout.guest(vm) / "created"
        if not created.exists():
            await self.middleware("vm", "create", "--name", vm, "--certificate", self.layout.certificate(vm))
            private_folder(created.parent)
            created.touch()
        await self.start_vm(vm)

    async def _issue(self, vm: str, hypervisor: str) -> None:
        token = self.layout.token(vm, hypervisor)
        if token.exists() and time.time() - token.stat().st_mtime < FRESH_TOKEN:
            return
        token.unlink(missing_ok=True)
        await self.gose("issue-token", "--vm", vm, "--hypervisor", hypervisor, "--out", token)

    async def _start(self, name: str, command: str, verb: str, config: Path) -> None:
        daemon = Daemon(name, (command, verb, "--config", config), self.layout.log(name))
        self.daemons[name] = daemon
        await daemon.start()
