"""The daemon put together: every room of this folder, wired once, started in order and stopped in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc

from dom0_middleware.api.guard import Callers
from dom0_middleware.api.orchestrator import OrchestratorDoor, OrchestratorService
from dom0_middleware.api.servers import MAX_MESSAGE, GuestServerPairs, add_health, add_reflection, bind, make_server
from dom0_middleware.audit import Action, DomainRecord, open_audit_log
from dom0_middleware.authority import SERVER_NAME
from dom0_middleware.channels.choose import choose_channel
from dom0_middleware.channels.port import GuestChannel
from dom0_middleware.domain_template import DomainTemplate
from dom0_middleware.enrolment import JoinSecrets
from dom0_middleware.errors import MiddlewareError, Reason
from dom0_middleware.events import EventHub
from dom0_middleware.guest_authority import GuestAuthority
from dom0_middleware.hypervisor import Hypervisor
from dom0_middleware.identity import HypervisorIdentity, Identities
from dom0_middleware.libvirt_hypervisor import LibvirtHypervisor
from dom0_middleware.metrics import Metrics
from dom0_middleware.orchestrator_authority import OrchestratorAuthority, Orchestrators
from dom0_middleware.policy import Policy
from dom0_middleware.runs import Runs
from dom0_middleware.sessions import Grid, VmSessions
from dom0_middleware.settings import MiddlewareSettings
from dom0_middleware.start_checks import expiries, grid_authority
from dom0_middleware.state import StateStore, VmRecord
from dom0_middleware.status import StatusBoard
from dom0_middleware.tokens import TokenWatch
from dom0_middleware.vms import Vms
from secfunet.errors import SecFuNetError
from secfunet.middleware.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from secfunet.service.doorkeeper import DoorBounds, Doorkeeper
from secfunet.service.files import private_folder
from secfunet.service.flood_log import FloodLog
from secfunet.service.grpc_door import GrpcDoor
from secfunet.service.metrics import MetricsServer
from secfunet.service.reload import Reloaded, Rereading, changed_keys
from secfunet.service.unix_socket import move_into_place, unix_target

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
READ_AGAIN = ("orchestrators.allowed", "destinations", "log_level")  # of the settings, when SIGHUP comes
MAX_ORCHESTRATORS = 48  # connections by TCP; the server has as many places for its Unix socket
ORCHESTRATORS_BOUNDS = DoorBounds(silent=256, talking=64)  # strangers at their port
STOP_GRACE = 1.0  # seconds that an orchestrator's call gets to end


class MiddlewareService:
    """Async context manager: entering starts the daemon, leaving stops it.

    ``grid`` and ``hypervisor_identity``: how the grid is reached and who this hypervisor is; both are opened and closed by the caller
    (``grid.run_middleware`` makes the real ones). ``hypervisor`` and ``channel`` None: libvirt, and what the settings say.
    ``read_again`` reads the settings as they are now (raises SettingsError); None: ``settings`` for good.
    ``boot_id``: names this boot of the host; None: the kernel's.
    """

    def __init__(
        self,
        settings: MiddlewareSettings,
        *,
        grid: Grid,
        hypervisor_identity: HypervisorIdentity,
        hypervisor: Hypervisor | None = None,
        channel: GuestChannel | None = None,
        read_again: Callable[[], MiddlewareSettings] | None = None,
        boot_id: str | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        randbytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._allowed = frozenset(settings.orchestrators.allowed)
        self._file = Rereading(settings, read_again)
        self._keeper = Doorkeeper(ORCHESTRATORS_BOUNDS)
        self._stack = AsyncExitStack()
        state = private_folder(settings.state)
        authority = GuestAuthority.load(state, clock=clock, agent_lifetime=settings.limits.agent_certificate_lifetime)
        self._orchestrator_authority = OrchestratorAuthority.load(state, clock=clock)
        self._channel_refusals = FloodLog(monotonic=monotonic)
        self._store = StateStore(state / "state.sqlite")
        self.metrics = Metrics()
        self.audit = open_audit_log(settings.audit_file, clock=clock, sync_interval=settings.audit.sync_interval)
        self.policy = Policy(settings.policy, monotonic=monotonic)
        self.sessions = VmSessions(grid, clock=clock)
        self.events = EventHub(clock=clock)
        secrets = JoinSecrets(self._store, randbytes=randbytes)
        servers = GuestServerPairs(
            authority=authority,
            secrets=secrets,
            policy=self.policy,
            sessions=self.sessions,
            identities=Identities(policy=self.policy, sessions=self.sessions, hypervisor=hypervisor_identity),
            audit=self.audit,
            metrics=self.metrics,
            operations_in_flight=settings.limits.operations_in_flight,
            concurrent_calls=settings.limits.concurrent_calls,
            reflection=settings.reflection,
        )
        hypervisor = hypervisor or libvirt_of(settings)
        ca = grid_authority(settings.grid.authority, now=clock())
        runs = Runs(
            store=self._store,
            hypervisor=hypervisor,
            channel=channel
            or choose_channel(
                settings.channel, state / "guests", refused=self._channel_refused, flooded=self._channel_flooded
            ),
            servers=servers,
            sessions=self.sessions,
            secrets=secrets,
            authority=authority,
            metrics=self.metrics,
            clock=clock,
        )
        self.vms = Vms(
            store=self._store,
            hypervisor=hypervisor,
            runs=runs,
            sessions=self.sessions,
            events=self.events,
            identity=hypervisor_identity,
            destinations=settings.destinations,
            grid_authority=ca,
            note=self._note_migration,
            clock=clock,
            boot=boot_id or BOOT_ID.read_text(encoding="ascii").strip(),
        )
        self._status = StatusBoard(
            vms=self.vms,
            grid=grid,
            identity=hypervisor_identity,
            authority=ca,
            policy=self.policy,
            audit=self.audit,
            store=self._store,
            expiries=lambda: expiries(settings),
            clock=clock,
        )
        servers.on_flood = runs.hang_up
        servers.on_secret_used, servers.on_enrolled = self.vms.secret_used, self.vms.enrolled
        self.metrics.sessions.set_function(lambda: len(self.sessions))
        self.metrics.agents.set_function(lambda: sum(guest.presence.connected for guest in self.vms.guests()))
        self._tokens = TokenWatch(self._store, self.metrics, clock=clock)

    async def __aenter__(self) -> MiddlewareService:
        async with AsyncExitStack() as stack:
            stack.callback(self._store.close)
            await stack.enter_async_context(self.audit)
            self.audit.record(DomainRecord(Action.DAEMON_START, "noted"))
            stack.callback(self._note_stop)
            self.policy.reload()
            self._note_policy()
            stack.push_async_callback(self.sessions.close)
            stack.push_async_callback(self.vms.close)
            await self.vms.start()
            watch = asyncio.create_task(self._tokens.run(), name="token-watch")
            stack.callback(watch.cancel)
            for path in (self._settings.orchestrator_socket, self._settings.state / "guests"):
                unix_target(path)  # gRPC cannot reach every path: better said now than when a VM starts
            await self._serve_orchestrators(stack)
            stack.enter_context(MetricsServer(self.metrics.registry, self._settings.metrics_port))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def reload(self) -> None:
        """SIGHUP: reads the policy, who may command, where VMs may be sent and the log level again, and lets go of an audit log that was
        rotated away.
        """
        self.policy.reload()
        self._note_policy()
        self._reload_settings()
        try:
            self.audit.reopen()
        except (SecFuNetError, OSError) as error:
            log.error("the audit log cannot be opened again: %s", error)
        for guest in self.vms.guests():
            guest.identity_changed()

    def _reload_settings(self) -> None:
        new = self._file.again()
        if new is None:
            # As with the policy: who may do what is not known, so nobody may do anything.
            self._allowed = frozenset()
            log.error("while the settings are invalid every orchestrator is refused")
        else:
            before = self._file.settings
            self._allowed = frozenset(new.orchestrators.allowed)
            self.vms.set_destinations(new.destinations)
            logging.getLogger().setLevel(new.log_level.upper())
            result = Reloaded(changed=[key for key in changed_keys(before, new) if key in READ_AGAIN])
            result.needs_restart = self._file.adopt(new, READ_AGAIN)
            result.say()
        with contextlib.suppress(MiddlewareError):  # a full log must not stop a reload
            names = ", ".join(sorted(self._allowed)) or "nobody"
            self.audit.record(DomainRecord(Action.ORCHESTRATORS_READ, "noted", detail=names))

    async def _serve_orchestrators(self, stack: AsyncExitStack) -> None:
        def allowed() -> frozenset[str]:
            return self._allowed

        door = OrchestratorDoor(Orchestrators(self._settings.state), allowed=allowed, clock=self._clock)
        tcp: GrpcDoor | None = None
        if self._settings.orchestrators.address is not None:
            # Any local user reaches a port of the loopback.
            tcp = GrpcDoor(self._keeper, "orchestrators", inside=MAX_ORCHESTRATORS)
            stack.push_async_callback(tcp.wait_closed)
        guard = Callers(door.admit, audit=self.audit, metrics=self.metrics, max_request=MAX_MESSAGE, door=tcp).guard()
        server = make_server(
            guard, max_message=MAX_MESSAGE, connections=2 * MAX_ORCHESTRATORS + ORCHESTRATORS_BOUNDS.talking
        )
        service = OrchestratorService(self.vms, events=self.events, audit=self.audit, door=door, status=self._status)
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(service, server)
        name = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
        await add_health(server, name)
        if self._settings.reflection:
            add_reflection(server, [name])
        credentials = grpc.ssl_server_credentials(
            [self._orchestrator_authority.server_pair(SERVER_NAME)],
            root_certificates=self._orchestrator_authority.certificate_pem,
            require_client_auth=True,
        )
        socket = self._settings.orchestrator_socket
        private_folder(socket.parent)
        # gRPC removes what it finds where it binds, and again when it stops: it gets a name of its own beside the socket's.
        folder = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        made = socket.parent / f".{os.getpid()}.s"
        bind(server, f"unix:/proc/self/fd/{folder}/{made.name}", credentials)
        if tcp is not None:
            tcp.bind(server, credentials)
        await server.start()
        stack.push_async_callback(server.stop, STOP_GRACE)
        if tcp is not None and self._settings.orchestrators.address is not None:
            host, _, port = self._settings.orchestrators.address.rpartition(":")
            await tcp.open(host.strip("[]"), int(port))
            stack.callback(tcp.close)
        # The folder may be another than ours: the socket itself is for its owner only.
        made.chmod(0o600)
        stack.enter_context(move_into_place(made, socket))

    def _channel_refused(self, uuid: str, why: str) -> None:
        """A connection that is not the domain's came to its channel."""
        self.metrics.refused_calls.labels(reason=str(Reason.CHANNEL_FOREIGN)).inc()
        if times := self._channel_refusals.count(uuid):
            detail = why if times == 1 else f"{why} ({times} times)"
            with contextlib.suppress(MiddlewareError):
                self.audit.record(
                    DomainRecord(
                        Action.CHANNEL_REFUSED, "refused", vm=uuid, reason=str(Reason.CHANNEL_FOREIGN), detail=detail
                    )
                )

    def _channel_flooded(self, uuid: str, why: str) -> None:
        """A guest went beyond the bounds of its channel, which was ended for it."""
        self.metrics.refused_calls.labels(reason=str(Reason.CHANNEL_FLOODED)).inc()
        with contextlib.suppress(MiddlewareError):
            self.audit.record(
                DomainRecord(Action.CHANNEL_ENDED, "refused", vm=uuid, reason=str(Reason.CHANNEL_FLOODED), detail=why)
            )

    def _note_migration(self, what: str, record: VmRecord) -> None:
        with contextlib.suppress(MiddlewareError):  # what happened has happened
            action = Action.VM_ARRIVED if what == "arrived" else Action.VM_LEFT
            self.audit.record(DomainRecord(action, "noted", vm=record.uuid, name=record.name, detail=record.leaving))

    def _note_policy(self) -> None:
        problems = "; ".join(self.policy.problems)
        with contextlib.suppress(MiddlewareError):  # a full log must not stop a reload
            reason = str(Reason.POLICY_INVALID) if problems else ""
            self.audit.record(DomainRecord(Action.POLICY_READ, "noted", reason=reason, detail=problems))

    def _note_stop(self) -> None:
        with contextlib.suppress(MiddlewareError):
            self.audit.record(DomainRecord(Action.DAEMON_STOP, "noted"))


def libvirt_of(settings: MiddlewareSettings) -> LibvirtHypervisor:
    """The hypervisor of these settings, not yet connected. Raises TemplateError."""
    template = settings.libvirt.template
    return LibvirtHypervisor(
        settings.libvirt.uri,
        template=DomainTemplate.load(template) if template is not None else None,
        heal_interval=settings.libvirt.heal_interval,
    )
