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
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from dom0_middleware.channels.door import Door, listen
from dom0_middleware.channels.folder import DomainFolders
from dom0_middleware.channels.interfaces import BridgeFacts, back_ends, objection, read_facts
from dom0_middleware.channels.iproute import FactsUnavailable
from dom0_middleware.channels.pinning import Basis, Pinning
from dom0_middleware.channels.port import (
    ChannelAddresses,
    ChannelDomain,
    ChannelError,
    ChannelState,
    ChannelStatus,
    Flooded,
    JoinInformation,
)
from dom0_middleware.channels.relay import Relay
from dom0_middleware.channels.xenstore_join import XenstoreJoin
from secfunet.service.files import write_atomically
from secfunet.service.flood_log import FloodLog

log = logging.getLogger(__name__)

CHECK_INTERVAL = 10.0  # seconds between looks at the source of a connection that lasts
FACTS_AGE = 1.0  # seconds for which what the tables said is believed
_PORTS_FILE, _PIN_FILE = "ports.json", "pin.json"

Refused = Callable[[str, str], None]
"""Told of each connection that is refused: the UUID of the domain whose port it was, and why."""

ReadFacts = Callable[[int, str, str], Awaitable[BridgeFacts]]


@dataclass
class _Ports:
    """Of one domain. ``asked``: when its facts were read, and what was found against it then ("": nothing)."""

    domain: ChannelDomain
    relay: Relay
    doors: list[Door] = field(default_factory=list)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: tuple[float, str] = (float("-inf"), "")
    pinned: Basis | None = None


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
        flooded: Flooded = lambda uuid, why: None,
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
        self._flooded = flooded
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
        return ChannelStatus(ChannelState.OPEN if ports.relay.is_used else ChannelState.WAITING, ports.relay.since)

    def hang_up(self, uuid: str, why: str) -> None:
        if (ports := self._ports_of.get(uuid)) is None or not ports.relay.hang_up():
            return
        log.warning("a domain's channel ended: %s", why, extra={"vm": uuid})
        for door in ports.doors:
            door.punish()
        self._flooded(uuid, why)

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
        pinned = await self._pin(domain)
        ports = _Ports(domain, Relay(partial(self._refuse, domain.uuid)), pinned=pinned)
        self._ports_of[domain.uuid] = ports
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
                    listen(self._address, number),
                    entitled=ports.domain.address,
                    welcome=partial(self._welcome, ports, path),
                    stranger=partial(self._meet, ports.domain),
                    no_room=self._note_no_room,
                )
                return door, number
        await self._shut(ports.domain.uuid)
        raise ChannelError(f"no port of the range is free at {self._address} (is that an address of this host?)")

    def _meet(self, domain: ChannelDomain, source: str) -> None:
        self._refuse(domain.uuid, "stranger", f"it comes from {source}, the domain's address is {domain.address}")

    def _note_no_room(self, error: OSError) -> None:
        self._flood.warning("no room", f"a connection of a domain cannot be taken: {error.strerror}")

    def _welcome(self, ports: _Ports, path: Path, connection: socket.socket) -> None:
        """From the domain's address; whether it is the domain's is looked at now."""
        ports.relay.take(path, connection, objection=partial(self._objection, ports), watch=partial(self._watch, ports))

    async def _watch(self, ports: _Ports) -> None:
        """Returns once the connection is not the domain's any more."""
        while True:
            await asyncio.sleep(self._check_interval)
            if why := await self._objection(ports):
                self._refuse(ports.domain.uuid, "foreign", f"while it was open: {why}")
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
                    if ports.pinned != self._pinning.basis(facts.interfaces):
                        ports.pinned = await self._pin(domain)
                        facts = await self._facts(domain.domain_id, domain.address, self._bridge)
                    why = objection(domain.address, domain.address, facts)
                except FactsUnavailable as error:
                    why = str(error)
                ports.asked = clock(), why
        return why

    def _refuse(self, uuid: str, reason: str, why: str) -> None:
        self._flood.warning(reason, "a connection to a domain's port is refused", {"vm": uuid, "why": why})
        self._refused(uuid, why)

    async def _pin(self, domain: ChannelDomain) -> Basis | None:
        """What it was built on; None: nothing."""
        assert domain.domain_id is not None  # noqa: S101 - looked at before
        try:
            interfaces = await back_ends(domain.domain_id)
        except FactsUnavailable as error:
            self._flood.warning(
                "interfaces", f"a domain's interfaces cannot be told to the bridge: {error}", {"vm": domain.uuid}
            )
            return None
        basis = self._pinning.basis(interfaces)
        pin = {"address": domain.address, "interfaces": dict(interfaces)}
        write_atomically(self._folders.path(domain.uuid) / _PIN_FILE, json.dumps(pin).encode())
        await self._pinning.pin(domain.address, interfaces)
        return basis

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
        await ports.relay.close()


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
