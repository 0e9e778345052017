"""A pair of ports on the bridge a domain, for guests that cannot have a vchan.

Mutual TLS says who calls, as everywhere; before a byte of it, and again while a connection lasts, the connection's source must be the
domain's by what the hypervisor and the bridge say (``interfaces``). gRPC itself listens on Unix sockets only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from dom0_middleware.channels.folder import DomainFolders
from dom0_middleware.channels.interfaces import BridgeFacts, FactsUnavailable, objection, read_facts
from dom0_middleware.channels.port import ChannelAddresses, ChannelDomain, ChannelError, ChannelStatus, JoinInformation
from dom0_middleware.channels.xenstore_join import XenstoreJoin
from secfunet.service.files import write_atomically

log = logging.getLogger(__name__)

CHECK_INTERVAL = 10.0  # seconds between looks at the source of a connection that lasts
MAX_CONNECTIONS = 16  # of one domain's port, accepted and not yet checked or closed
_READ_SIZE = 65536
_PORTS_FILE = "ports.json"

Refused = Callable[[str, str], None]
"""Told of each connection that is refused: the UUID of the domain whose port it was, and why."""

ReadFacts = Callable[[int, str, str], Awaitable[BridgeFacts]]


@dataclass
class _Door:
    domain: ChannelDomain
    servers: list[asyncio.Server] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


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
    ) -> None:
        self._folders = DomainFolders(folder)
        self._join = XenstoreJoin()
        self._address = address
        self._bridge = bridge
        self._ports = ports
        self._refused = refused
        self._facts = facts
        self._check_interval = check_interval
        self._doors: dict[str, _Door] = {}

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
        return ChannelStatus()

    async def hand_over(self, join: JoinInformation) -> None:
        await self._join.hand_over(join)

    async def erase_join(self, uuid: str) -> None:
        await self._join.erase(uuid)

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        await self._join.erase(uuid)
        self._join.forget(uuid)
        await self._shut(uuid)
        self._folders.remove(uuid)

    async def sweep(self, running: Iterable[str]) -> None:
        self._folders.sweep(running)

    async def stop(self) -> None:
        for uuid in list(self._doors):
            await self._shut(uuid)

    async def _listen(self, domain: ChannelDomain, wanted: tuple[int, ...]) -> ChannelAddresses:
        if domain.domain_id is None or not domain.address:
            raise ChannelError("a VM that is reached by TCP needs an address: create it with one")
        door = self._doors[domain.uuid] = _Door(domain)
        ports = []
        for index, socket in enumerate(self._folders.sockets(domain.uuid)):
            server, port = await self._listen_at(door, socket, wanted[index : index + 1] or tuple(self._ports))
            door.servers.append(server)
            ports.append(port)
        write_atomically(self._folders.path(domain.uuid) / _PORTS_FILE, json.dumps(ports).encode())
        self._join.domain(domain.uuid, domain.domain_id)
        host = f"[{self._address}]" if ip_address(self._address).version == 6 else self._address
        enrol, agent = self._folders.sockets(domain.uuid)
        return ChannelAddresses(
            f"unix:{enrol}",
            f"unix:{agent}",
            guest_enrol=f"tcp:{host}:{ports[0]}",
            guest_agent=f"tcp:{host}:{ports[1]}",
        )

    async def _listen_at(self, door: _Door, socket: Path, ports: Iterable[int]) -> tuple[asyncio.Server, int]:
        accept = partial(self._accept, door, socket)
        for port in ports:
            with contextlib.suppress(OSError):
                server = await asyncio.start_server(accept, self._address, port, backlog=MAX_CONNECTIONS)
                return server, port
        await self._shut(door.domain.uuid)
        raise ChannelError(f"no port of the range is free at {self._address} (is that an address of this host?)")

    async def _accept(
        self, door: _Door, socket: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs this in one  # noqa: S101
        door.tasks.add(task)
        task.add_done_callback(door.tasks.discard)
        source = str(writer.get_extra_info("peername")[0])
        try:
            if len(door.tasks) > 2 * MAX_CONNECTIONS:
                self._refuse(door, "it has too many connections")
            elif not (why := await self._objection(door, source)):
                await self._relay(door, socket, source, reader, writer)
            else:
                self._refuse(door, why)
        except OSError:
            pass  # either side is gone
        finally:
            writer.close()

    async def _relay(
        self, door: _Door, socket: Path, source: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket)
        work = [
            asyncio.ensure_future(_copy(reader, inner_writer)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
            asyncio.ensure_future(self._watch(door, source)),
        ]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            inner_writer.close()

    async def _watch(self, door: _Door, source: str) -> None:
        """Returns once the connection is not the domain's any more."""
        while True:
            await asyncio.sleep(self._check_interval)
            if why := await self._objection(door, source):
                self._refuse(door, f"while it was open: {why}")
                return

    async def _objection(self, door: _Door, source: str) -> str:
        if door.domain.domain_id is None:
            return "the domain has no number"
        try:
            facts = await self._facts(door.domain.domain_id, source, self._bridge)
        except FactsUnavailable as error:
            return str(error)
        return objection(source, door.domain.address, facts)

    def _refuse(self, door: _Door, why: str) -> None:
        log.warning("a connection to a domain's port is refused: %s", why, extra={"vm": door.domain.uuid})
        self._refused(door.domain.uuid, why)

    async def _shut(self, uuid: str) -> None:
        door = self._doors.pop(uuid, None)
        if door is None:
            return
        for server in door.servers:
            server.close()
        for task in door.tasks:
            task.cancel()
        await asyncio.gather(*door.tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_READ_SIZE):
        writer.write(data)
        await writer.drain()


def _read_ports(path: Path) -> tuple[int, ...]:
    try:
        ports = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ()
    return tuple(port for port in ports if isinstance(port, int)) if isinstance(ports, list) else ()
