"""The hypervisor, as the rest of this room sees it: a port. ``libvirt_hypervisor`` is its adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class DomainState(Enum):
    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"


class DomainEventKind(Enum):
    STARTED = "started"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    STOPPED = "stopped"  # shut down, destroyed, crashed or saved: it runs here no longer
    MIGRATED = "migrated"  # as STOPPED, because it went to another host
    UNDEFINED = "undefined"


@dataclass(frozen=True)
class DomainSpec:
    """What a domain is defined from. ``vmid`` (x5t#S256 thumbprint) is bound to it in its metadata."""

    uuid: str
    name: str
    vmid: str
    memory_mib: int
    vcpus: int
    address: str = ""


@dataclass(frozen=True)
class DomainInfo:
    """What the hypervisor says of a domain now. ``domain_id``: the number of this very run, None while stopped."""

    uuid: str
    name: str
    state: DomainState
    domain_id: int | None
    vmid: str | None


@dataclass(frozen=True)
class DomainEvent:
    uuid: str
    name: str
    kind: DomainEventKind


EventListener = Callable[[DomainEvent], None]
ConnectionListener = Callable[[bool], None]


class Hypervisor(Protocol):
    """Every call raises Unavailable (HYPERVISOR_UNAVAILABLE) while the connection is lost, and Refused (LIBVIRT_REFUSED,
    VM_UNKNOWN, VM_EXISTS) for what the hypervisor itself refuses. Listeners are called in the event loop."""

    @property
    def connected(self) -> bool: ...

    async def connect(self, on_event: EventListener, on_connection: ConnectionListener) -> None:
        """Connects, and from then on keeps connected: a lost connection is opened again, and ``on_connection(True)`` called."""
        ...

    async def close(self) -> None: ...

    async def define(self, spec: DomainSpec) -> DomainInfo: ...

    async def create(self, uuid: str, *, paused: bool = False) -> DomainInfo:
        """Boots a defined domain; ``paused``: it exists, and waits for ``resume`` before its first instruction."""
        ...

    async def suspend(self, uuid: str) -> None: ...

    async def resume(self, uuid: str) -> None: ...

    async def shutdown(self, uuid: str) -> None:
        """Asks the guest to shut down; it may take its time."""
        ...

    async def destroy(self, uuid: str) -> None:
        """Pulls the plug."""
        ...

    async def undefine(self, uuid: str) -> tuple[str, ...]:
        """Removes a stopped domain, with what the hypervisor kept of it besides its definition; says what that was."""
        ...

    async def migrate(self, uuid: str, uri: str) -> None:
        """Sends a running domain to the hypervisor at ``uri`` while it runs, with its definition; returns when it runs there.

        May take minutes. Raises Refused (LIBVIRT_REFUSED) if it failed, or if how it ended is not known.
        """
        ...

    async def migrating(self, uuid: str) -> bool:
        """A migration of this domain, into this host or out of it, is under way as far as the hypervisor can say."""
        ...

    async def info(self, uuid: str) -> DomainInfo | None: ...

    async def list(self, uuids: Collection[str]) -> tuple[DomainInfo, ...]:
        """Of these domains, those that there are; the hypervisor is asked for its domains once."""
        ...
