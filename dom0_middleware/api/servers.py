"""gRPC servers over TLS: a pair for each domain (made with the domain, ended with it), and one for orchestrators."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped] # it ships no types

from dom0_middleware.api.agent import AgentService
from dom0_middleware.api.enrolment import EnrolmentService
from dom0_middleware.api.errors import facts_of
from dom0_middleware.api.guard import Callers, peer_certificate
from dom0_middleware.call import Call
from dom0_middleware.channels.port import ChannelAddresses
from dom0_middleware.enrolment import JoinSecrets
from dom0_middleware.errors import Reason, Unavailable
from dom0_middleware.guest import GuestDomain
from dom0_middleware.guest_authority import AgentCertificate, GuestAuthority, agent_certificate
from dom0_middleware.identity import Identities
from dom0_middleware.key_checks import KeyChecks
from dom0_middleware.metrics import Metrics
from dom0_middleware.operations import Operations
from dom0_middleware.policy import Policy
from dom0_middleware.sessions import VmSessions
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from secfunet.rpc.guard import Context, Guard
from secfunet.service.audit import AuditLog
from secfunet.service.unix_socket import unix_target

MAX_MESSAGE = 64 * 1024  # bytes: a batch of 64 operations has at most 40 KiB
MAX_ENROL_MESSAGE = 16 * 1024
_MAX_CERTIFICATES = 8  # parsed ones that are remembered, a domain
# Of one server: one guest must not use up the descriptors that all of them share. An agent needs one, and another while it renews.
MAX_CONNECTIONS = 16
STREAMS_A_CONNECTION = 42
ENROL_CALLS = 16
HANDSHAKE_TIMEOUT_MS = 10_000
KEEPALIVE_MS = 12_000

ServerOptions = Sequence[tuple[str, int]]


def make_server(
    guard: Guard, *, max_message: int, streams: int = STREAMS_A_CONNECTION, connections: int = MAX_CONNECTIONS
) -> grpc.aio.Server:
    """``streams``: calls at once of one connection, and so messages of ``max_message`` bytes that are not complete or not read."""
    options: ServerOptions = (
        # Further ones wait at the client. gRPC's own bound on all calls of a server would turn them away at once, as fast as they come.
        ("grpc.max_concurrent_streams", streams),
        # What a caller may send before anybody reads it is this much a stream, whatever the connection's speed.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 64 * 1024),
        ("grpc.max_receive_message_length", max_message),
        # Each socket is one server's: a second one on the same path is a fault.
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", 16384),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        # A guest that is silently gone (paused, or the host at the other end of a bridge lost its power) is noticed within half a minute.
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # An agent on the bridge asks for a sign of life every 15 seconds.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    )
    return grpc.aio.server(interceptors=(guard,), options=options)


async def add_health(server: grpc.aio.Server, service: str) -> None:
    servicer = health.aio.HealthServicer()
    await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    # Only where it is wanted: the import is not free.
    from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped] # it ships no types

    reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server)


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Raises Unavailable if the address cannot be used; the port, for TCP."""
    scheme, _, path = address.partition(":")
    target = unix_target(Path(path)) if scheme == "unix" else address
    try:
        port = server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise Unavailable(Reason.INTERNAL, f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise Unavailable(Reason.INTERNAL, f"cannot listen on {address}")
    return port


class GuestServerPairs:
    """See ``runs.GuestServers``; ``on_secret_used`` and ``on_enrolled`` have to be set before the first ``open``.

    They are told of each right use of a join secret, and of the first certificate that a run's agent shows. ``on_flood`` is told of a guest
    whose channel is to be ended, and why.
    """

    on_secret_used: Callable[[GuestDomain], Awaitable[None]]
    on_enrolled: Callable[[GuestDomain], None]
    on_flood: Callable[[str, str], None]

    def __init__(
        self,
        *,
        authority: GuestAuthority,
        secrets: JoinSecrets,
        policy: Policy,
        sessions: VmSessions,
        identities: Identities,
        audit: AuditLog,
        metrics: Metrics,
        operations_in_flight: int,
        concurrent_calls: int,
        reflection: bool,
    ) -> None:
        self._authority = authority
        self._secrets = secrets
        self._policy = policy
        self._sessions = sessions
        self._identities = identities
        self._audit = audit
        self._metrics = metrics
        self._operations_in_flight = operations_in_flight
        self._concurrent_calls = concurrent_calls
        self._reflection = reflection
        self._key_checks = KeyChecks()
        self._pairs: dict[str, tuple[grpc.aio.Server, grpc.aio.Server]] = {}

    async def open(self, guest: GuestDomain, addresses: ChannelAddresses) -> None:
        pair = self._server_pair()
        enrol, agent = await self._enrol_server(guest), await self._agent_server(guest)
        bind(enrol, addresses.enrol, grpc.ssl_server_credentials([pair]))
        bind(
            agent,
            addresses.agent,
            grpc.ssl_server_credentials(
                [pair], root_certificates=self._authority.certificate_pem, require_client_auth=True
            ),
        )
        self._pairs[guest.uuid] = (enrol, agent)
        await enrol.start()
        await agent.start()

    async def close(self, uuid: str) -> None:
        """At once: whatever call is in flight is cancelled."""
        pair = self._pairs.pop(uuid, None)
        if pair is not None:
            await asyncio.gather(*(server.stop(0) for server in pair))

    def _server_pair(self) -> tuple[bytes, bytes]:
        return self._authority.server_pair()

    async def _enrol_server(self, guest: GuestDomain) -> grpc.aio.Server:
        def admit(context: Context, call: Call) -> Call:
            self._policy.require_valid()
            return call

        server = make_server(
            Callers(
                admit,
                audit=self._audit,
                metrics=self._metrics,
                guest=guest,
                flooded=partial(self.on_flood, guest.uuid),
                calls=ENROL_CALLS,
            ).guard(),
            max_message=MAX_ENROL_MESSAGE,
            streams=2,
        )
        service = EnrolmentService(
            guest,
            secrets=self._secrets,
            authority=self._authority,
            identities=self._identities,
            audit=self._audit,
            key_checks=self._key_checks,
            on_secret_used=self.on_secret_used,
        )
        agent_pb2_grpc.add_EnrolmentServiceServicer_to_server(service, server)
        await self._add_common(server, agent_pb2.DESCRIPTOR.services_by_name["EnrolmentService"].full_name)
        return server

    async def _agent_server(self, guest: GuestDomain) -> grpc.aio.Server:
        known: dict[bytes, AgentCertificate] = {}

        def admit(context: Context, call: Call) -> Call:
            pem = peer_certificate(context)
            certificate = known.get(pem)
            if certificate is None:
                certificate = agent_certificate(pem)
                if len(known) >= _MAX_CERTIFICATES:
                    known.clear()
                known[pem] = certificate
            guest.require_current(certificate)
            guest.require_running()
            self._policy.require_valid()
            if guest.shows_certificate():
                self.on_enrolled(guest)
            return replace(call, certificate=certificate)

        server = make_server(
            Callers(
                admit,
                audit=self._audit,
                metrics=self._metrics,
                guest=guest,
                flooded=partial(self.on_flood, guest.uuid),
                calls=self._concurrent_calls,
            ).guard(),
            max_message=MAX_MESSAGE,
        )
        service = AgentService(
            guest,
            operations=Operations(
                guest,
                policy=self._policy,
                sessions=self._sessions,
                audit=self._audit,
                metrics=self._metrics,
                limit=self._operations_in_flight,
                facts_of=facts_of,
            ),
            identities=self._identities,
            authority=self._authority,
            audit=self._audit,
            key_checks=self._key_checks,
        )
        agent_pb2_grpc.add_AgentServiceServicer_to_server(service, server)
        await self._add_common(server, agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name)
        return server

    async def _add_common(self, server: grpc.aio.Server, service: str) -> None:
        await add_health(server, service)
        if self._reflection:
            add_reflection(server, [service])
