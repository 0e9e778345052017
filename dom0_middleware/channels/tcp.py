"""A pair of ports on the bridge a domain, for guests that cannot have a vchan.

Mutual TLS says who calls, as everywhere; before a byte of it, and again while a connection lasts, the connection's source must be the
domain's by what the hypervisor and the bridge say (``interfaces``). gRPC itself listens on Unix sockets only.

What others send must not decide about a domain: who has not its address is gone before anything is asked (``door``), and what the bridge
knows of the domain is not for its neighbours to change (``pinning``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from dom0_middleware.channels.door import Door
from dom0_middleware.channels.folder import DomainFolders
from dom0_middleware.channels.interfaces import BridgeFacts, back_ends, objection, read_facts
from dom0_middleware.channels.iproute import FactsUnavailable
from dom0_middleware.channels.pinning import Pinning
from dom0_middleware.channels.port import (
    ChannelAddresses,
    ChannelDomain,
    ChannelError,
    ChannelState,
    ChannelStatus,
    JoinInformation,
)
from dom0_middleware.channels.xenstore_join import XenstoreJoin
from secfunet.service.files import write_atomically
from secfunet.service.flood_log import FloodLog
from secfunet.xen.budget import Budget

log = logging.getLogger(__name__)

CHECK_INTERVAL = 10.0  # seconds between looks at the source of a connection that lasts
FACTS_AGE = 1.0  # seconds for which what the tables said is believed
MAX_CONNECTIONS = 16  # of one domain, each port
_READ_SIZE = 65536
_CLOSE_TIMEOUT = 1.0  # seconds
_PORTS_FILE, _PIN_FILE = "ports.json", "pin.json"

Refused = Callable[[str, str], None]
"""Told of each connection that is refused: the UUID of the domain whose port it was, and why."""

ReadFacts = Callable[[int, str, str], Awaitable[BridgeFacts]]


@dataclass
class _Ports:
    """Of one domain. ``asked``: when its facts were read, and what was found against it then ("": nothing)."""

    domain: ChannelDomain
    doors: list[Door] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: tuple[float, str] = (float("-inf"), "")
    budget: Budget = field(default_factory=Budget)
    since: float = field(default_factory=time.time)
    relayed: int = 0

    def count(self, more: int) -> None:
        """``more`` connections are relayed."""
        if bool(self.relayed) != bool(self.relayed + more):
            self.since = time.time()
        self.relayed += more


class TcpChannel:
    """See ``port.GuestChannel``. ``address``: dom0's own on ``bridge``. ``ports``: those that may be used."""

    through_xen = True

    def __init__(
        self,
        folder: Path,
        *,
        address: str,
        bridge: str,
        ports: range,
        refused: Refused,
        facts: ReadFacts = read_facts,
        check_interval: float = CHECK_INTERVAL,
        facts_age: float = FACTS_AGE,
    ) -> None:
        self._folders = DomainFolders(folder)
        self._join = XenstoreJoin()
        self._address = address
        self._bridge = bridge
        self._ports = ports
        self._refused = refused
        self._facts = facts
        self._check_interval = check_interval
        self._facts_age = facts_age
        self._pinning = Pinning(bridge, address)
        self._flood = FloodLog(log)
        self._ports_of: dict[str, _Ports] = {}

    async def open(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.make(domain.uuid)
        return await self._listen(domain, ())

    async def reopen(self, domain: ChannelDomain) -> ChannelAddresses:
        path = self._folders.keep(domain.uuid)
        # The guest knows its ports: they have to be the same ones.
        return await self._listen(domain, _read_ports(path / _PORTS_FILE))

    def folder(self, uuid: str) -> str:
        return ""

    def status(self, uuid: str) -> ChannelStatus:
        if (ports := self._ports_of.get(uuid)) is None:
            return ChannelStatus()
        return ChannelStatus(ChannelState.OPEN if ports.relayed else ChannelState.WAITING, ports.since)

    async def hand_over(self, join: JoinInformation) -> None:
        await self._join.hand_over(join)

    async def erase_join(self, uuid: str) -> None:
        await self._join.erase(uuid)

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        await self._join.erase(uuid)
        self._join.forget(uuid)
        await self._shut(uuid)
        await self._unpin(uuid)
        self._folders.remove(uuid)

    async def sweep(self, running: Iterable[str]) -> None:
        keep = set(running)
        for uuid in self._folders.uuids():
            if uuid not in keep:
                await self._unpin(uuid)
        self._folders.sweep(keep)

    async def stop(self) -> None:
        for uuid in list(self._ports_of):
            await self._shut(uuid)

    async def _listen(self, domain: ChannelDomain, wanted: tuple[int, ...]) -> ChannelAddresses:
        if domain.domain_id is None or not domain.address:
            raise ChannelError("a VM that is reached by TCP needs an address: create it with one")
        await self._pin(domain)
        ports = self._ports_of[domain.uuid] = _Ports(domain)
        numbers = []
        for index, path in enumerate(self._folders.sockets(domain.uuid)):
            door, number = await self._listen_at(ports, path, wanted[index : index + 1] or tuple(self._ports))
            ports.doors.append(door)
            numbers.append(number)
        write_atomically(self._folders.path(domain.uuid) / _PORTS_FILE, json.dumps(numbers).encode())
        self._join.domain(domain.uuid, domain.domain_id)
        host = f"[{self._address}]" if ip_address(self._address).version == 6 else self._address
        enrol, agent = self._folders.sockets(domain.uuid)
        return ChannelAddresses(
            f"unix:{enrol}",
            f"unix:{agent}",
            guest_enrol=f"tcp:{host}:{numbers[0]}",
            guest_agent=f"tcp:{host}:{numbers[1]}",
        )

    async def _listen_at(self, ports: _Ports, path: Path, numbers: Iterable[int]) -> tuple[Door, int]:
        for number in numbers:
            with contextlib.suppress(OSError):
                door = Door(
                    self._address,
                    number,
                    entitled=ports.domain.address,
                    welcome=partial(self._welcome, ports, path),
                    stranger=partial(self._meet, ports),
                    no_room=self._note_no_room,
                )
                return door, number
        await self._shut(ports.domain.uuid)
        raise ChannelError(f"no port of the range is free at {self._address} (is that an address of this host?)")

    def _meet(self, ports: _Ports, source: str) -> None:
        self._refuse(ports, "stranger", f"it comes from {source}, the domain's address is {ports.domain.address}")

    def _note_no_room(self, error: OSError) -> None:
        self._flood.warning("no room", f"a connection of a domain cannot be taken: {error.strerror}")

    def _welcome(self, ports: _Ports, path: Path, connection: socket.socket) -> None:
        """From the domain's address; whether it is the domain's is looked at now."""
        if len(ports.tasks) >= 2 * MAX_CONNECTIONS:
            connection.close()
            self._refuse(ports, "many", "it has too many connections")
            return
        task = asyncio.ensure_future(self._serve(ports, path, connection))
        ports.tasks.add(task)
        task.add_done_callback(ports.tasks.discard)
        # Also of a task that was cancelled before it began.
        task.add_done_callback(lambda _: connection.close())

    async def _serve(self, ports: _Ports, path: Path, connection: socket.socket) -> None:
        try:
            if why := await self._objection(ports):
                self._refuse(ports, "foreign", why)
                return
            reader, writer = await asyncio.open_connection(sock=connection)
            ports.count(1)
            try:
                await self._relay(ports, path, reader, writer)
            finally:
                ports.count(-1)
                writer.transport.abort()
        except OSError:
            pass  # either side is gone

    async def _relay(
        self, ports: _Ports, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        work = [
            asyncio.ensure_future(_copy(reader, inner_writer, ports.budget)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
            asyncio.ensure_future(self._watch(ports)),
        ]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await _finish(writer)
            inner_writer.transport.abort()

    async def _watch(self, ports: _Ports) -> None:
        """Returns once the connection is not the domain's any more."""
        while True:
            await asyncio.sleep(self._check_interval)
            if why := await self._objection(ports):
                self._refuse(ports, "foreign", f"while it was open: {why}")
                return

    async def _objection(self, ports: _Ports) -> str:
        """What speaks against connections from the domain's address now; what was found a moment ago counts."""
        domain = ports.domain
        if domain.domain_id is None:
            return "the domain has no number"
        clock = asyncio.get_running_loop().time
        async with ports.looking:
            at, why = ports.asked
            if clock() - at >= self._facts_age:
                try:
                    facts = await self._facts(domain.domain_id, domain.address, self._bridge)
                    why = objection(domain.address, domain.address, facts)
                except FactsUnavailable as error:
                    why = str(error)
                ports.asked = clock(), why
        return why

    def _refuse(self, ports: _Ports, reason: str, why: str) -> None:
        self._flood.warning(reason, "a connection to a domain's port is refused", {"vm": ports.domain.uuid, "why": why})
        self._refused(ports.domain.uuid, why)

    async def _pin(self, domain: ChannelDomain) -> None:
        assert domain.domain_id is not None  # noqa: S101 - looked at before
        try:
            interfaces = await back_ends(domain.domain_id)
        except FactsUnavailable as error:
            log.warning("a domain's interfaces cannot be told to the bridge: %s", error, extra={"vm": domain.uuid})
            return
        pin = {"address": domain.address, "interfaces": dict(interfaces)}
        write_atomically(self._folders.path(domain.uuid) / _PIN_FILE, json.dumps(pin).encode())
        await self._pinning.pin(domain.address, interfaces)

    async def _unpin(self, uuid: str) -> None:
        """What an earlier process of this daemon pinned, too: it is in the domain's folder."""
        address, interfaces = _read_pin(self._folders.path(uuid) / _PIN_FILE)
        if address:
            await self._pinning.unpin(address, interfaces)

    async def _shut(self, uuid: str) -> None:
        ports = self._ports_of.pop(uuid, None)
        if ports is None:
            return
        for door in ports.doors:
            door.close()
        for task in ports.tasks:
            task.cancel()
        await asyncio.gather(*ports.tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: Budget | None = None) -> None:
    """Until its end. With a ``budget``, no faster than that: a guest that always has more must not keep the loop."""
    while data := await reader.read(_READ_SIZE):
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(budget.spend(1, 0, len(data)) if budget is not None else 0)


async def _finish(writer: asyncio.StreamWriter) -> None:
    """What is left for the guest is sent, if it takes it in time."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            await writer.wait_closed()


def _read_pin(path: Path) -> tuple[str, Mapping[str, str]]:
    try:
        raw = json.loads(path.read_bytes())
        address, interfaces = str(ip_address(raw["address"])), raw["interfaces"]
        return address, {str(name): str(mac) for name, mac in interfaces.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "", {}


def _read_ports(path: Path) -> tuple[int, ...]:
    try:
        ports = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ()
    return tuple(port for port in ports if isinstance(port, int)) if isinstance(ports, list) else ()
