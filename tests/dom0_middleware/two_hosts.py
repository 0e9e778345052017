"""Two dom0s that can send each other domains: hypervisors in memory that speak the same port as libvirt's, and a guest.

What a domain has with it on its way is its ``home``: there its present host writes the join information, and there its agent looks, as
it does in xenstore.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from dom0_middleware.channels.folder import FolderChannel
from dom0_middleware.channels.port import ChannelAddresses, ChannelDomain, JoinInformation
from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable
from dom0_middleware.hypervisor import (
    ConnectionListener,
    DomainEvent,
    DomainEventKind,
    DomainInfo,
    DomainSpec,
    DomainState,
    EventListener,
)
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.files import write_atomically
from tests.dom0_middleware.world import TIMEOUT, World, certificate, require_signature, sign_operation, token
from vm_agent.server import AgentService
from vm_agent.settings import AgentSettings


@dataclass
class Domain:
    spec: DomainSpec
    state: DomainState = DomainState.STOPPED
    number: int | None = None


class HostDouble:
    """See ``hypervisor.Hypervisor``. ``gate``: cleared, a migration waits half-way; ``failure``: how the next one ends."""

    def __init__(self, uri: str, network: dict[str, HostDouble], first_number: int) -> None:
        self.uri = uri
        self.domains: dict[str, Domain] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: MiddlewareError | None = None
        self.on_migrate: Callable[[], None] = lambda: None
        self.connected = False
        self._moves: set[asyncio.Task[None]] = set()
        self._moving: set[str] = set()
        self._number = first_number
        self._network = network
        self._on_event: EventListener = lambda event: None
        self._on_connection: ConnectionListener = lambda connected: None
        network[uri] = self

    async def connect(self, on_event: EventListener, on_connection: ConnectionListener) -> None:
        self._on_event, self._on_connection = on_event, on_connection
        self.connected = True

    async def close(self) -> None:
        self.connected = False
        self._on_event, self._on_connection = lambda event: None, lambda connected: None

    def lose(self) -> None:
        self.connected = False
        self._on_connection(False)

    def find_again(self) -> None:
        self.connected = True
        self._on_connection(True)

    async def define(self, spec: DomainSpec) -> DomainInfo:
        self._require_connected()
        if any(spec.name == one.spec.name or spec.uuid == uuid for uuid, one in self.domains.items()):
            raise Refused(Reason.VM_EXISTS, "exists")
        self.domains[spec.uuid] = Domain(spec)
        return self._info(spec.uuid)

    async def create(self, uuid: str, *, paused: bool = False) -> DomainInfo:
        self._run(uuid, DomainState.PAUSED if paused else DomainState.RUNNING)
        self._tell(uuid, DomainEventKind.STARTED)
        return self._info(uuid)

    async def suspend(self, uuid: str) -> None:
        self._domain(uuid).state = DomainState.PAUSED
        self._tell(uuid, DomainEventKind.SUSPENDED)

    def reboot_guest(self, uuid: str, *, tell: bool = True) -> None:
        """As its guest may at any time: another domain of the same definition. ``tell``: the events come at once, not later."""
        self._number += 1
        self._domain(uuid).number = self._number
        if not tell:
            return
        self._tell(uuid, DomainEventKind.STOPPED)
        self._tell(uuid, DomainEventKind.STARTED)

    async def resume(self, uuid: str) -> None:
        self._domain(uuid).state = DomainState.RUNNING
        self._tell(uuid, DomainEventKind.RESUMED)

    async def shutdown(self, uuid: str) -> None:
        await self.destroy(uuid)

    async def destroy(self, uuid: str) -> None:
        domain = self._domain(uuid)
        domain.state, domain.number = DomainState.STOPPED, None
        self._tell(uuid, DomainEventKind.STOPPED)

    async def undefine(self, uuid: str) -> tuple[str, ...]:
        self._domain(uuid)
        del self.domains[uuid]
        return ()

    async def info(self, uuid: str) -> DomainInfo | None:
        self._require_connected()
        return self._info(uuid) if uuid in self.domains else None

    async def list(self, uuids: Collection[str]) -> tuple[DomainInfo, ...]:
        self._require_connected()
        return tuple(self._info(uuid) for uuid in self.domains if uuid in uuids)

    async def migrating(self, uuid: str) -> bool:
        self._require_connected()
        return uuid in self._moving

    async def migrate(self, uuid: str, uri: str) -> None:
        self._require_connected()
        # As libvirt's, it goes on when whoever asked for it is gone.
        task = asyncio.ensure_future(self.move(uuid, uri))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)
        await asyncio.shield(task)

    async def move(self, uuid: str, uri: str) -> None:
        """What ``virsh migrate`` does, too."""
        domain, target = self.domains[uuid], self._network.get(uri)
        self.on_migrate()
        self._moving.add(uuid)
        # As libvirt shows it: over there it is a stopped domain, and a job is under way for it.
        receives = target is not None and uuid not in target.domains
        if target is not None and receives:
            target.domains[uuid] = Domain(domain.spec)
            target._moving.add(uuid)
        try:
            await self.gate.wait()
        finally:
            self._moving.discard(uuid)
            if target is not None and receives:
                target._moving.discard(uuid)
                del target.domains[uuid]
        failure, self.failure = self.failure, None
        if failure is None and target is None:
            failure = Refused(Reason.LIBVIRT_REFUSED, "no such host")
        if failure is not None or target is None:
            raise failure or AssertionError
        target.arrive(domain.spec)
        del self.domains[uuid]
        self._on_event(DomainEvent(uuid, domain.spec.name, DomainEventKind.MIGRATED))

    def arrive(self, spec: DomainSpec) -> None:
        """A domain comes from another host, ours or not."""
        if any(spec.name == one.spec.name for one in self.domains.values()):
            raise Refused(Reason.LIBVIRT_REFUSED, "Domain with that name already exists")
        self.domains[spec.uuid] = Domain(spec)
        self._run(spec.uuid, DomainState.RUNNING)
        self._tell(spec.uuid, DomainEventKind.STARTED)
        self._tell(spec.uuid, DomainEventKind.RESUMED)

    def reboot(self) -> None:
        """dom0 and Xen with it."""
        self._moving.clear()
        for move in self._moves:
            move.cancel()
        for domain in self.domains.values():
            domain.state, domain.number = DomainState.STOPPED, None

    def _run(self, uuid: str, state: DomainState) -> None:
        domain = self.domains[uuid]
        self._number += 1
        domain.state, domain.number = state, self._number

    def _domain(self, uuid: str) -> Domain:
        self._require_connected()
        if uuid not in self.domains:
            raise Refused(Reason.VM_UNKNOWN, "unknown")
        return self.domains[uuid]

    def _info(self, uuid: str) -> DomainInfo:
        domain = self.domains[uuid]
        return DomainInfo(uuid, domain.spec.name, domain.state, domain.number, domain.spec.vmid)

    def _tell(self, uuid: str, kind: DomainEventKind) -> None:
        event = DomainEvent(uuid, self.domains[uuid].spec.name, kind)
        asyncio.get_running_loop().call_soon(lambda: self._on_event(event))

    def _require_connected(self) -> None:
        if not self.connected:
            raise Unavailable(Reason.HYPERVISOR_UNAVAILABLE, "the hypervisor cannot be reached", retry_after=1.0)


class HomeChannel(FolderChannel):
    """A channel through Xen as far as it is seen from above: for a domain that has a number, and handed over in the domain's home."""

    through_xen = True

    def __init__(self, folder: Path, homes: Path) -> None:
        super().__init__(folder)
        self._homes = homes
        self.opened: list[ChannelDomain] = []
        self.closed: list[tuple[str, float]] = []

    async def open(self, domain: ChannelDomain) -> ChannelAddresses:
        assert domain.domain_id is not None
        self.opened.append(domain)
        return await super().open(domain)

    def folder(self, uuid: str) -> str:
        return ""

    async def hand_over(self, join: JoinInformation) -> None:
        write_atomically(home(self._homes, join.uuid), join.to_json())

    async def erase_join(self, uuid: str) -> None:
        home(self._homes, uuid).unlink(missing_ok=True)

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        self.closed.append((uuid, grace))
        await self.erase_join(uuid)
        await super().close(uuid, grace=grace)

    def _addresses(self, uuid: str) -> ChannelAddresses:
        return replace(super()._addresses(uuid), folder="")


def home(homes: Path, uuid: str) -> Path:
    folder = homes / uuid[:8]
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "join.json"


class Host:
    """One dom0: ``world`` is its middleware, ``hypervisor`` what it runs on."""

    def __init__(self, folder: Path, name: str, homes: Path, hypervisor: HostDouble, peer: str) -> None:
        folder.mkdir(mode=0o700)
        self.world = World(folder, hypervisor=name)
        self.hypervisor = hypervisor
        self.channel = HomeChannel(folder / "c", homes)
        self.world.parts = {"hypervisor": hypervisor, "channel": self.channel, "boot_id": "first"}
        self.world.extra = {"destinations": {peer: f"xen+tls://{peer}/system"}}
        self.name = name

    def token(self, vm: str = "web") -> str:
        return token(vm, hypervisor=self.name)

    async def vm(self, uuid: str) -> pb.Vm:
        async with self.world.orchestrator() as stub:
            return (await stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=TIMEOUT)).vm

    async def definition(self, uuid: str) -> pb.VmDefinition:
        async with self.world.orchestrator() as stub:
            return (await stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=TIMEOUT)).definition

    async def expect(self, definition: pb.VmDefinition, vm_auth_token: str = "") -> pb.Vm:
        async with self.world.orchestrator() as stub:
            request = pb.ExpectVmRequest(definition=definition, vm_auth_token=vm_auth_token)
            return (await stub.ExpectVm(request, timeout=TIMEOUT)).vm

    async def start(self, uuid: str, vm_auth_token: str = "") -> pb.Vm:
        async with self.world.orchestrator() as stub:
            request = pb.StartVmRequest(uuid=uuid, vm_auth_token=vm_auth_token)
            return (await stub.StartVm(request, timeout=TIMEOUT)).vm

    async def stop(self, uuid: str) -> pb.Vm:
        async with self.world.orchestrator() as stub:
            return (await stub.StopVm(pb.StopVmRequest(uuid=uuid, force=True), timeout=TIMEOUT)).vm

    async def migrate(self, uuid: str, destination: str, *, timeout: float = TIMEOUT) -> pb.Vm:
        async with self.world.orchestrator() as stub:
            request = pb.MigrateVmRequest(uuid=uuid, destination=destination)
            return (await stub.MigrateVm(request, timeout=timeout)).vm

    def happened(self, uuid: str) -> list[str]:
        """What the audit log has of the VM."""
        return [str(record["action"]) for record in self.world.audit() if record.get("vm") == uuid]


@dataclass
class TwoHosts:
    """``a`` and ``b``, each the other's destination."""

    a: Host
    b: Host
    homes: Path

    async def running(self, vm: str = "web") -> str:
        """A VM that runs on ``a``; its UUID."""
        uuid = await self.a.world.create(vm, vm_auth_token=self.a.token(vm))
        await self.a.start(uuid)
        return uuid

    @contextlib.asynccontextmanager
    async def agent(self, uuid: str) -> AsyncIterator[AgentService]:
        """The real agent inside the VM: it runs as long as the context lasts, wherever the VM is."""
        folder = home(self.homes, uuid).parent
        settings = AgentSettings.model_validate({}, context={"folder": folder})
        async with AgentService(settings.options()) as agent:
            yield agent


async def signs(agent: AgentService, host: Host, vm: str = "web") -> bool:
    """The VM's key answers its agent, through ``host``'s middleware and no other."""
    before = len(host.world.grid.executed)
    operation = sign_operation()
    async with asyncio.timeout(TIMEOUT * 2):
        while True:
            try:
                signature = await agent.operate(operation, timeout=TIMEOUT)
                break
            except Exception:  # noqa: BLE001 - it is on its way to the other host
                await asyncio.sleep(0.1)
    require_signature(signature, operation, vm)
    return len(host.world.grid.executed) > before


@contextlib.asynccontextmanager
async def two_hosts() -> AsyncIterator[TwoHosts]:
    for name in ("a", "b", "hypervisor", "web", "db"):
        certificate(name)
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as name:
        folder = Path(name)
        homes = folder / "h"
        homes.mkdir(mode=0o700)
        network: dict[str, HostDouble] = {}
        a = Host(folder / "a", "a", homes, HostDouble("xen+tls://a/system", network, 1), "b")
        b = Host(folder / "b", "b", homes, HostDouble("xen+tls://b/system", network, 40), "a")
        try:
            await a.world.start()
            await b.world.start()
            yield TwoHosts(a, b, homes)
        finally:
            await a.world.stop()
            await b.world.stop()
