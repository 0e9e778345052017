"""The running grid: its doors, its cards and its state, put together, started in order and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped] # has no types

from gose.answers import AnswerStore
from gose.authority import OPENID_PROVIDER, SERVICE_PROVIDER, AuthorityFolder
from gose.certificates import ServerCertificates, client_context
from gose.checks import look_before_start, provider_problem
from gose.errors import StartError
from gose.http import Door, RunningServer
from gose.metrics import Metrics
from gose.openid_provider.endpoint import ENDPOINT_PATH, Endpoint
from gose.openid_provider.login import Login
from gose.openid_provider.sign_on import SignOns
from gose.openid_provider.store import SqliteOpenIdStore
from gose.racs.tls import client_side
from gose.registry import Registry
from gose.report import report_of
from gose.running import RunningGrid, alone, reporting
from gose.service_provider.execution import Executor
from gose.service_provider.guard import Callers
from gose.service_provider.health import CheckOnlyHealth
from gose.service_provider.openid_client import OpenIdHttp
from gose.service_provider.operations import ServiceProvider
from gose.service_provider.sessions_http import RETURN_PATH, SessionDoor
from gose.sessions import SessionStore
from gose.settings import GoseSettings, origin
from gose.single_use import RateLimit, SingleUse
from gose.slots.rack import Rack
from gose.standing import RegistryStanding
from gose.state import SERVING_BUSY_TIMEOUT, open_database
from secfunet.container import ContainerProfile
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import service_provider_pb2, service_provider_pb2_grpc
from secfunet.identity import Role
from secfunet.openid.association import AssociationType, SessionType
from secfunet.openid.effects import FetchPolicy
from secfunet.openid.provider import CheckidRequest, OpenIdProvider
from secfunet.openid.relying_party import RelyingParty
from secfunet.service.doorkeeper import Doorkeeper
from secfunet.service.files import private_folder
from secfunet.service.findings import Weight
from secfunet.service.grpc_door import GrpcDoor
from secfunet.service.metrics import MetricsServer
from secfunet.service.reload import Reloaded, Rereading, changed_keys
from secfunet.tandem.aio import start_tandem_server
from secfunet.tandem.parameters import TandemParameters
from secfunet.vm_auth_token import TokenVerifier

if TYPE_CHECKING:
    from gose.radius.server import RadiusServer

log = logging.getLogger(__name__)

SERVICE_NAME = service_provider_pb2.DESCRIPTOR.services_by_name["ServiceProviderService"].full_name
MAINTENANCE_INTERVAL = 10.0  # seconds
SEALING_THREADS = 2
# The endpoint is reached by TLS only, which needs no obsolete 1024-bit Diffie-Hellman group inside it.
ASSOCIATIONS = (
    (AssociationType.HMAC_SHA256, SessionType.NO_ENCRYPTION),
    (AssociationType.HMAC_SHA256, SessionType.DH_SHA256),
)
DISCOVERY_LIFETIME = 300.0  # seconds that the service provider believes what it discovered about an identifier


class GridService:
    """Entering the context starts the grid: when that returns, every door is open. Leaving it stops the grid cleanly.

    Raises StartError, OSError, SettingsError and the errors of the authority when it cannot start. A card that cannot be reached is no
    reason not to start: it is tried until it is back.
    """

    def __init__(
        self,
        settings: GoseSettings,
        *,
        read_again: Callable[[], GoseSettings] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = Rereading(settings, read_again)
        self._certificates: ServerCertificates
        self._radius: RadiusServer | None = None
        self.metrics = Metrics()
        self.rack: Rack
        self.sessions: SessionStore
        self.executor: Executor
        self.callers: Callers
        self._clock = clock
        self._keeper = Doorkeeper(settings.limits.door_bounds())
        self._stack = AsyncExitStack()

    @property
    def settings(self) -> GoseSettings:
        """Those in force."""
        return self._file.settings

    async def reload(self) -> None:
        """Reads the settings again (SIGHUP): cards come and go, the others are not disturbed; nothing changes if they cannot be used."""
        new = self._file.again()
        if new is None:
            return
        # All that can be wrong is looked at before anything is changed.
        try:
            if new.racs is not None:
                client_side(new.racs.key, new.racs.certificate, new.racs.authority or self._keys.ca_path)
            secrets = None if self._radius is None or new.radius is None else self._radius.read_clients(new.radius)
            self._certificates.read()
        except (SecFuNetError, OSError) as error:
            log.error("the new settings cannot be used, everything stays as it was: %s", error)
            return
        before, result = self.settings, Reloaded()
        result.changed += self._certificates.show()
        result.changed += await self.rack.change(new)
        if self._radius is not None and secrets is not None and self._radius.change_clients(secrets):
            result.changed.append("radius.clients")
        result.needs_restart = self._file.adopt(
            new, ("secure_elements", "racs", "openid_provider.realms", "radius.clients", "log_level")
        )
        logging.getLogger().setLevel(new.log_level.upper())
        result.changed += [
            key for key in changed_keys(before, new) if key in ("racs", "openid_provider.realms", "log_level")
        ]
        result.say()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log.info("the grid shuts down")
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        settings, limits, metrics = self.settings, self.settings.limits, self.metrics
        keys = self._keys = AuthorityFolder(settings.authority)
        self._certificates = ServerCertificates(keys)
        private_folder(settings.state)
        stack.enter_context(alone(settings.state))
        self._look()
        # State.
        registry = stack.enter_context(contextlib.closing(Registry(settings.database, clock=self._clock)))
        standing = stack.enter_context(contextlib.closing(RegistryStanding(registry, settings.database)))
        database = stack.enter_context(
            contextlib.closing(open_database(settings.state / "service.sqlite", "", busy_timeout=SERVING_BUSY_TIMEOUT))
        )
        answers = stack.enter_context(
            contextlib.closing(
                AnswerStore(
                    settings.state / "answers.sqlite",
                    keep=limits.answers_kept,
                    max_bytes=limits.answers_size,
                    clock=self._clock,
                )
            )
        )
        sessions = self.sessions = SessionStore(database, standing, limits, metrics, clock=self._clock)
        openid_store = SqliteOpenIdStore(database)
        await stack.enter_async_context(self._maintained(sessions, openid_store, answers))
        stack.enter_context(MetricsServer(metrics.registry, settings.metrics_port))
        # Cards.
        self.rack = Rack(settings, metrics, admit=standing.card)
        stack.push_async_callback(self.rack.close)
        await self.rack.start()
        threads = ThreadPoolExecutor(SEALING_THREADS, thread_name_prefix="seal")
        stack.callback(threads.shutdown)
        executor = self.executor = Executor(
            self.rack,
            answers,
            standing,
            keys.container_key,
            limits,
            metrics,
            profile=ContainerProfile.named(settings.container_profile),
            threads=threads,
            clock=self._clock,
        )
        stack.push_async_callback(executor.close, limits.shutdown_timeout)
        # Doors.
        await self._open_openid_provider(
            stack, keys, openid_store, SignOns(database, lifetime=limits.sso_lifetime, clock=self._clock), standing
        )
        await self._open_sessions(stack, keys, openid_store, registry, standing, sessions)
        service_provider = await self._open_operations(stack, keys, executor, sessions, standing)
        await self._open_radius(stack, keys, standing)
        started_at = self._clock()

        def report() -> RunningGrid:
            streams = service_provider.streams
            return report_of(self.rack, sessions, streams=streams, started_at=started_at, now=self._clock())

        await stack.enter_async_context(reporting(settings.state, report))
        # A provider elsewhere may come later; a name of ours that leads elsewhere is told here, before a login fails of it.
        asking = asyncio.create_task(self._ask_provider(), name="a look at the OpenID provider")
        stack.callback(asking.cancel)
        log.info(
            "the grid is ready",
            extra={
                "service_provider": f"https://{settings.service_provider.https}",
                "operations": str(settings.service_provider.grpc),
                "openid_provider": f"https://{settings.openid_provider.endpoint}",
                "login": f"https://{settings.openid_provider.login}",
                "cards": {slot.seid: slot.state.value for slot in self.rack.slots()},
                "sessions": len(sessions),
            },
        )

    async def _ask_provider(self) -> None:
        if (problem := await provider_problem(self.settings)) is not None:
            log.warning("%s", problem)

    def _look(self) -> None:
        """Before anything is opened: what is wrong is told at once, and by its key. Raises StartError."""
        found = list(look_before_start(self.settings, now=self._clock()))
        for finding in found:
            if finding.weight in (Weight.WARNING, Weight.AWAY):
                log.warning("%s", finding)
        if wrong := [str(finding) for finding in found if finding.weight is Weight.WRONG]:
            raise StartError("; ".join(wrong))

    # --- the OpenID provider

    async def _open_openid_provider(
        self,
        stack: AsyncExitStack,
        keys: AuthorityFolder,
        store: SqliteOpenIdStore,
        sign_ons: SignOns,
        standing: RegistryStanding,
    ) -> None:
        settings, limits = self.settings, self.settings.limits
        own_origin = origin(settings.openid_provider_host, settings.openid_provider.endpoint.port)
        provider = OpenIdProvider(
            f"{own_origin}{ENDPOINT_PATH}",
            store,
            self._clock,
            # Nobody is logged in at a relying party that the administrator has not named: no person is asked here.
            accepts_realm=self._serves_realm,
            association_lifetime=int(limits.association_lifetime),
        )
        pending: SingleUse[CheckidRequest] = SingleUse(limit=limits.logins_pending, lifetime=limits.login_lifetime)
        endpoint = Endpoint(
            provider,
            origin=own_origin,
            login_origin=origin(settings.openid_provider_host, settings.openid_provider.login.port),
            pending=pending,
            sign_ons=sign_ons,
            standing=standing,
            login_lifetime=limits.login_lifetime,
            association_rate=RateLimit(limit=limits.associations_per_minute, window=60.0, what="associations"),
        )
        endpoint.door = Door("openid endpoint", endpoint.routes(), limits, self.metrics)
        stack.push_async_callback(endpoint.door.close)
        await endpoint.door.start_tls(
            settings.openid_provider.endpoint,
            self._certificates.context(OPENID_PROVIDER),
            self._keeper,
        )
        login = Login(
            provider,
            endpoint,
            authority=keys.ca_certificate,
            pending=pending,
            sign_ons=sign_ons,
            standing=standing,
            metrics=self.metrics,
            clock=self._clock,
        )
        # A connection counts as a login only as long as a login counts.
        door = Door("openid login", login.routes(), limits, self.metrics, max_age=limits.sso_lifetime)
        stack.push_async_callback(door.close)

        async def listen(factory: Callable[[], asyncio.Protocol]) -> RunningServer:
            return await start_tandem_server(
                factory,
                self.rack.logins,
                host=settings.openid_provider.login.host,
                port=settings.openid_provider.login.port,
                parameters=TandemParameters(alpn=("http/1.1",), clock=self._clock, patience=limits.peer_patience),
                handshake_timeout=limits.handshake_timeout,
                max_handshakes=limits.handshakes,
                max_connections=limits.http_connections,
                keeper=self._keeper,
            )

        await door.start(listen)

    def _serves_realm(self, realm: str) -> bool:
        return realm == self._service_provider_realm() or realm in self.settings.openid_provider.realms

    # --- the service provider

    def _service_provider_realm(self) -> str:
        return f"{self.settings.audience}/"

    async def _open_sessions(
        self,
        stack: AsyncExitStack,
        keys: AuthorityFolder,
        store: SqliteOpenIdStore,
        registry: Registry,
        standing: RegistryStanding,
        sessions: SessionStore,
    ) -> None:
        settings, limits = self.settings, self.settings.limits
        provider = settings.service_provider.openid_provider or origin(
            settings.openid_provider_host, settings.openid_provider.endpoint.port
        )
        http = await stack.enter_async_context(
            OpenIdHttp(client_context(keys.ca_path), timeout=limits.http_request_timeout)
        )
        sessions_door = SessionDoor(
            origin=settings.audience,
            provider=provider,
            relying_party=RelyingParty(
                self._service_provider_realm(),
                f"{settings.audience}{RETURN_PATH}",
                store,
                FetchPolicy([provider]),
                self._clock,
                discovery_lifetime=DISCOVERY_LIFETIME,
                preferences=ASSOCIATIONS,
            ),
            http=http,
            authority=keys.ca_certificate,
            container_authority=keys.container_certificate,
            verifier=TokenVerifier(keys.token_issuer, settings.audience, keys.token_keys),
            registry=registry,
            standing=standing,
            sessions=sessions,
            rack=self.rack,
            limits=limits,
            clock=self._clock,
        )
        sessions_door.door = Door("sessions", sessions_door.routes(), limits, self.metrics)
        stack.push_async_callback(sessions_door.door.close)
        await sessions_door.door.start_tls(
            settings.service_provider.https,
            self._certificates.context(SERVICE_PROVIDER, client_authority=keys.ca_path),
            self._keeper,
        )

    async def _open_operations(
        self,
        stack: AsyncExitStack,
        keys: AuthorityFolder,
        executor: Executor,
        sessions: SessionStore,
        standing: RegistryStanding,
    ) -> ServiceProvider:
        settings, limits = self.settings, self.settings.limits
        door = GrpcDoor(self._keeper, "operations", inside=limits.grpc_connections)
        stack.push_async_callback(door.wait_closed)
        self.callers = Callers(
            sessions, standing, self.metrics, calls_per_hypervisor=limits.calls_per_hypervisor, door=door
        )
        server = grpc.aio.server(
            interceptors=[self.callers.guard()],
            options=[
                ("grpc.max_receive_message_length", limits.message_size),
                ("grpc.max_send_message_length", limits.message_size),
                ("grpc.max_concurrent_streams", 1024),
                ("grpc.so_reuseport", 0),
                # Whoever connects and says nothing is not waited for.
                ("grpc.server_handshake_timeout_ms", round(limits.handshake_timeout * 1000)),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.max_connection_idle_ms", 15 * 60_000),
            ],
        )
        service_provider = ServiceProvider(executor, sessions, limits, self.metrics)
        service_provider_pb2_grpc.add_ServiceProviderServiceServicer_to_server(service_provider, server)
        health = CheckOnlyHealth()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        credentials = self._certificates.grpc_credentials()
        address = settings.service_provider.grpc
        try:
            door.bind(server, credentials)
        except RuntimeError as error:
            raise StartError(f"the gRPC server cannot listen: {error}") from None
        stack.push_async_callback(server.stop, limits.shutdown_timeout)
        await server.start()
        try:
            await door.open(*address)
        except OSError as error:
            raise StartError(f"the gRPC door cannot listen on {address}: {error.strerror or error}") from None
        stack.callback(door.close)
        stack.callback(service_provider.drain)
        stack.push_async_callback(health.enter_graceful_shutdown)
        for name in ("", SERVICE_NAME):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return service_provider

    async def _open_radius(self, stack: AsyncExitStack, keys: AuthorityFolder, standing: RegistryStanding) -> None:
        settings, limits = self.settings.radius, self.settings.limits
        if settings is None:
            return
        # Late: a grid that is no RADIUS server need not load it.
        from gose.radius.admission import Admission
        from gose.radius.dialogue import Dialogues
        from gose.radius.server import RadiusServer

        admission = Admission([Role(role) for role in settings.roles], keys.ca_certificate, standing, self._clock)
        dialogues = Dialogues(self.rack.radius, admission, limits, clock=self._clock)
        self._radius = await stack.enter_async_context(RadiusServer(settings, dialogues, limits, self.metrics))

    # --- in the background

    @contextlib.asynccontextmanager
    async def _maintained(
        self, sessions: SessionStore, store: SqliteOpenIdStore, answers: AnswerStore
    ) -> AsyncIterator[None]:
        async def maintain() -> None:
            while True:
                await asyncio.sleep(MAINTENANCE_INTERVAL)
                try:
                    sessions.purge()
                    store.purge(self._clock())
                    await asyncio.to_thread(answers.maintain)
                except Exception:
                    log.exception("maintenance failed; it is tried again")

        task = asyncio.create_task(maintain(), name="maintenance")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
