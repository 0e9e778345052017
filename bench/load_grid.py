"""A grid with as many model cards as one likes: ``gose serve`` and the cards are processes, hypervisors have keys in software."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from demo.processes import Daemon
from gose.authority import CardAccess, EnrolmentOrder, create_authority, enrol
from gose.settings import GoseSettings
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.client import pad_pin
from secfunet.card.parameters import KeyAlgorithm
from secfunet.card.place import parse_place
from secfunet.identity import Holder, Role
from secfunet.service.files import private_folder, write_atomically
from secfunet.service.settings import load_settings
from secure_element.pin import make_pin
from secure_element.store import KEY_DATA_SIZE, CardStore, DomainRecord, StoreContents, StoreSecret
from tests.gose.grid import TestGrid, free_ports

VALID = 86400.0
ENROLLED_AT_ONCE = 4
HYPERVISORS = 8

Latency = Mapping[str, float | str]


class LoadGrid:
    """``vms`` cards of VMs (vm-0 …), each with an RSA-2048 key, and ``servers`` server cards. Entering makes everything and starts nothing.

    ``processes`` serve the cards, in equal parts.
    """

    def __init__(self, folder: Path, *, vms: int, servers: int = 1, processes: int = 1) -> None:
        self._folder = folder
        self.vms = [f"vm-{number}" for number in range(vms)]
        self.servers = [f"server-{number}" for number in range(servers)]
        self._processes = processes
        self.grid: TestGrid
        self.gose: Daemon
        self.cards: list[Daemon] = []

    async def __aenter__(self) -> Self:
        private_folder(self._folder / "cards")
        names = [*self.vms, *self.servers]
        for name in names:
            _make_card(self._card_file(name))
        settings = self._write_settings()
        authority = create_authority(settings.authority, settings.names, now=time.time())
        self.grid = TestGrid(self._folder, settings, authority, {}, {})
        await self._start_cards({})
        try:
            await self._enrol_all()
        finally:
            await self._stop_cards()
        for number in range(HYPERVISORS):
            self.grid.hypervisor(f"hv-{number}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, latencies: Mapping[str, Latency]) -> None:
        """Cards (with the ``[benchmark_latency]`` of their name in ``latencies``; none: as fast as they are) and ``gose serve``."""
        await self.start_cards(latencies)
        self.gose = Daemon("gose", ("gose", "serve", "--config", self._settings_file), self._folder / "gose.log")
        await self.gose.start(timeout=120)

    async def start_cards(self, latencies: Mapping[str, Latency]) -> None:
        """The cards alone."""
        await self.stop()
        await self._start_cards(latencies)

    async def stop(self) -> None:
        """What runs of them."""
        if hasattr(self, "gose"):
            await self.gose.stop(timeout=20)
        await self._stop_cards()

    def memory(self) -> float:
        """Resident MiB of all processes that serve cards."""
        return sum(psutil.Process(daemon.pid).memory_info().rss for daemon in self.cards) / 2**20

    def processor_time(self) -> dict[str, float]:
        """Seconds that grid and cards have used since they were started."""
        used = {}
        for name, daemons in (("the grid", [self.gose]), ("the cards", self.cards)):
            times = [psutil.Process(daemon.pid).cpu_times() for daemon in daemons]
            used[name] = sum(one.user + one.system for one in times)
        return used

    def hypervisor_of(self, vm: str) -> str:
        """VMs are spread over the hypervisors."""
        return f"hv-{int(vm.removeprefix('vm-')) % HYPERVISORS}"

    # Making it

    def _card_file(self, name: str) -> Path:
        return self._folder / "cards" / f"{name}.toml"

    @property
    def _settings_file(self) -> Path:
        return self._folder / "gose.toml"

    def _write_settings(self) -> GoseSettings:
        ports = free_ports(4)
        lines = [
            'state = "state"',
            'log_level = "warning"',
            f'service_provider = {{ https = "127.0.0.1:{ports[0]}", grpc = "127.0.0.1:{ports[1]}" }}',
            f'openid_provider = {{ endpoint = "127.0.0.1:{ports[2]}", login = "127.0.0.1:{ports[3]}" }}',
        ]
        for names, role in ((self.vms, "vm"), (self.servers, "server")):
            for name in names:
                lines += [
                    "[[secure_elements]]",
                    f'seid = "{name}"\nrole = "{role}"\nsocket = "cards/{name}.sock"',
                    f'user_pin_file = "cards/{name}.pin"\nadministrator_keys_file = "cards/{name}.keys"',
                ]
        write_atomically(self._settings_file, "\n".join([*lines, ""]).encode())
        return load_settings(GoseSettings, self._settings_file)

    async def _start_cards(self, latencies: Mapping[str, Latency]) -> None:
        names = [*self.vms, *self.servers]
        for name in names:
            _write_card(self._card_file(name), latencies.get(name))
        for number in range(self._processes):
            files = [self._card_file(name) for name in names[number :: self._processes]]
            if files:
                daemon = Daemon(
                    f"cards-{number}",
                    (Path(sys.executable).name, "-m", "bench.model_cards", *files),
                    self._folder / f"cards-{number}.log",
                )
                self.cards.append(daemon)
                await daemon.start(timeout=120)

    async def _stop_cards(self) -> None:
        for daemon in self.cards:
            await daemon.stop(timeout=20)
        self.cards.clear()

    async def _enrol_all(self) -> None:
        places = asyncio.Semaphore(ENROLLED_AT_ONCE)
        settings, authority = self.grid.settings, self.grid.authority.certificate_authority
        with self.grid.registry() as registry:

            async def enrol_one(name: str, role: Role) -> None:
                element = settings.secure_element(name)
                assert element is not None
                assert element.socket is not None
                assert element.administrator_keys_file is not None
                order = EnrolmentOrder(
                    Holder(role, name),
                    label=role.value,
                    algorithm=KeyAlgorithm.RSA_2048,
                    valid=VALID,
                    seid=name,
                    server_names=settings.names if role is Role.SERVER else (),
                )
                access = CardAccess.at(
                    parse_place(str(element.socket)), AdministratorKeys.read(element.administrator_keys_file)
                )
                async with places:
                    identity = await enrol(order, access, authority, registry, clock=time.time)
                if role is Role.VM:
                    self.grid.vms[name] = identity

            wanted = [(name, Role.VM) for name in self.vms] + [(name, Role.SERVER) for name in self.servers]
            await asyncio.gather(*(enrol_one(name, role) for name, role in wanted))


def _make_card(config: Path) -> None:
    """Its secrets, its empty store."""
    pin, key, keys = secrets.token_hex(4).encode(), secrets.token_hex(32).encode(), AdministratorKeys.generate()
    write_atomically(config.with_suffix(".pin"), pin + b"\n")
    write_atomically(config.with_suffix(".key"), key)
    keys.write(config.with_suffix(".keys"))
    domain = DomainRecord(secrets.token_bytes(KEY_DATA_SIZE), {keys.version: keys.keys})
    contents = StoreContents(make_pin(pad_pin(pin), secrets.token_bytes), domain=domain)
    CardStore.create(config.with_suffix(".store"), StoreSecret(key), contents).close()


def _write_card(config: Path, latency: Latency | None) -> None:
    name = config.stem
    lines = [
        f'socket = "{name}.sock"',
        f'store = "{name}.store"',
        'log_level = "error"',
        "[store_key]",
        f'file = "{name}.key"',
    ]
    if latency is not None:
        lines += ["[benchmark_latency]", *(f"{key} = {_toml(value)}" for key, value in latency.items())]
    write_atomically(config, "\n".join([*lines, ""]).encode())


def _toml(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def every(names: Sequence[str], latency: Latency) -> dict[str, Latency]:
    """The same speed for all of them."""
    return dict.fromkeys(names, latency)
