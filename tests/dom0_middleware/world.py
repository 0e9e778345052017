"""A whole dom0 in one process: the real middleware over the test driver of libvirt, and a grid double that makes real containers.

The double implements what the middleware uses of ``gose_client.GoseClient`` truthfully: it verifies the VM-Auth-Token, signs with the
VM's key, and seals results as a grid does. Only the way to it (TLS-Tandem, cards, OpenID) is left out.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import libvirt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dom0_middleware.guest_authority import GuestAuthority
from dom0_middleware.orchestrator_authority import OrchestratorAuthority, credential_paths
from dom0_middleware.server import MiddlewareService
from dom0_middleware.settings import MiddlewareSettings
from gose.authority.certificate_authority import CertificateAuthority, new_authority_key
from gose_client.errors import GridRefusedError, SessionClosedError
from gose_client.trial import Link, LinkState
from secfunet.container import ContainerSealer, unwrap_content_key, verify_container
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import Holder, Role, der_of, pem_of, thumbprint
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc, orchestrator_pb2, orchestrator_pb2_grpc
from secfunet.operation import check_result, operation_name, parse_result_set, request_digest
from secfunet.service.settings import validate_settings
from secfunet.vm_auth_token import TokenError, TokenVerifier, issue_token, key_id

ISSUER, AUDIENCE = "https://gose.example/authority", "https://gose.example"
TIMEOUT = 10.0
ALL = frozenset({"sign", "decrypt", "encrypt"})
POLICY = """
[[rule]]
names = ["*"]
operations = ["sign", "decrypt", "encrypt"]
schemes = ["*"]
"""


@functools.cache
def rsa_key(_name: str) -> rsa.RSAPrivateKey:
    """One key a name and test run."""
    return rsa.generate_private_key(65537, 2048)


@functools.cache
def grid_authority() -> CertificateAuthority:
    """The grid's CA."""
    return CertificateAuthority.create("grid", new_authority_key("p-384"), now=time.time() - 3600)


HYPERVISORS = ("hypervisor", "a", "b")


@functools.cache
def certificate(name: str) -> bytes:
    """What the grid's CA issued (DER) for ``rsa_key(name)``: to a hypervisor, to its container authority, or to a VM."""
    key, now = rsa_key(name).public_key(), time.time()
    if name == "container-authority":
        return der_of(grid_authority().issue_container_authority(key, now=now, valid=86400))
    role = Role.HYPERVISOR if name in HYPERVISORS else Role.VM
    return der_of(grid_authority().issue(Holder(role, name), key, now=now, valid=86400))


@functools.cache
def token_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def token(
    vm: str,
    *,
    hypervisor: str = "hypervisor",
    operations: frozenset[str] = ALL,
    valid: float = 3600,
    issued_ago: float = 7200,
) -> str:
    now = time.time()
    return issue_token(
        token_key(),
        issuer=ISSUER,
        audience=AUDIENCE,
        vmid=thumbprint(certificate(vm)),
        hvid=thumbprint(certificate(hypervisor)),
        operations=operations,
        issued_at=now - issued_ago,
        expires_at=now + valid,
    )


@dataclass
class Answer:
    containers: tuple[bytes, ...]
    failures: tuple[operation_pb2.OperationFailure, ...]


@dataclass
class SessionDouble:
    grid: GridDouble
    vm: str
    vmid: str
    expires_at: float
    operations: frozenset[str]
    container_authority: bytes = field(default_factory=lambda: certificate("container-authority"))
    closed: bool = False

    async def execute(
        self, operations: Sequence[operation_pb2.Operation], *, timeout: float, correlation: str = ""
    ) -> Answer:
        if self.closed:
            raise SessionClosedError
        self.grid.correlations.append(correlation)
        self.grid.called.update({one.request_id.hex(): one.correlation_id for one in operations})
        self.grid.executed.append([operation.request_id for operation in operations])
        self.grid.timeouts.append(timeout)
        await self.grid.gate.wait()
        results, failures = [], []
        for operation in operations:
            if operation.request_id in self.grid.fail_ids:
                failures.append(
                    operation_pb2.OperationFailure(
                        request_id=operation.request_id, code=8, reason="SLOT_BUSY", message="busy", retry_after_ms=250
                    )
                )
                continue
            output = perform(rsa_key(self.vm), operation)
            digest = request_digest(operation)
            results.append(operation_pb2.Result(request_id=operation.request_id, request_digest=digest, output=output))
        containers = ()
        if results:
            plaintext = operation_pb2.ResultSet(
                vmid=self.vmid, hvid=self.grid.hvid, time=int(time.time()), results=results
            ).SerializeToString()
            containers = (self.grid.sealer.seal(plaintext),)
        return Answer(containers, tuple(failures))

    async def probe(self, *, timeout: float) -> int:
        self.grid.probes += 1
        if self.grid.broken is not None:
            raise self.grid.broken
        return int(time.time())

    async def close(self) -> None:
        self.closed = True


class GridDouble:
    """``gate``: cleared, executions wait. ``login_gate``: cleared, logins wait. ``fail_ids``: request ids that come back as failures."""

    def __init__(self, vms: Sequence[str] = ("web", "db"), *, hypervisor: str = "hypervisor") -> None:
        self.hypervisor = hypervisor
        self.hvid = thumbprint(certificate(hypervisor))
        self.names = {thumbprint(certificate(vm)): vm for vm in vms}
        self.sealer = ContainerSealer(rsa_key(hypervisor).public_key(), rsa_key("container-authority"))
        key = token_key().public_key()
        self.verifier = TokenVerifier(ISSUER, AUDIENCE, {key_id(key): key})
        self.sessions: list[SessionDouble] = []
        self.executed: list[list[bytes]] = []
        self.timeouts: list[float] = []
        self.fail_ids: set[bytes] = set()
        self.down: SecFuNetError | None = None
        self.broken: SecFuNetError | None = None  # what a probe finds
        self.probes = 0
        self.links: tuple[Link, ...] = (Link("card", LinkState.OK), Link("login", LinkState.OK))
        self.gate, self.login_gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.login_gate.set()
        self.logins = 0
        self.correlations: list[str] = []
        self.called: dict[str, str] = {}  # ids of operations by their request ids, hexadecimal

    async def open_session(
        self, vm_certificate: bytes, vm_auth_token: str, *, timeout: float, correlation: str = ""
    ) -> SessionDouble:
        self.logins += 1
        self.correlations.append(correlation)
        await self.login_gate.wait()
        if self.down is not None:
            raise self.down
        vmid = thumbprint(vm_certificate)
        try:
            claims = self.verifier.verify(
                vm_auth_token, vmid=vmid, hvid=self.hvid, now=time.time(), is_revoked=lambda jti: False
            )
        except TokenError as error:
            raise GridRefusedError(
                "TOKEN_REFUSED", "the VM-Auth-Token is refused", code=grpc.StatusCode.PERMISSION_DENIED
            ) from error
        session = SessionDouble(self, self.names[vmid], vmid, claims.expires_at, claims.operations)
        self.sessions.append(session)
        return session

    async def card_lives(self, *, timeout: float) -> None:
        return

    async def look(self, *, timeout: float) -> tuple[Link, ...]:
        return self.links

    async def content_key(self, container: bytes, *, timeout: float) -> bytes:
        return unwrap_content_key(rsa_key(self.hypervisor), container[:256])


class HypervisorDouble:
    """The HVID, without a card."""

    def __init__(self, name: str = "hypervisor") -> None:
        self.name = name

    @property
    def known(self) -> bytes:
        return certificate(self.name)

    async def certificate(self, *, timeout: float) -> bytes:
        return certificate(self.name)


def perform(key: rsa.RSAPrivateKey, operation: operation_pb2.Operation) -> bytes:
    """What the VM's card does (PSS and OAEP with SHA-256)."""
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    name = operation_name(operation)
    if name == "sign":
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        return key.sign(operation.sign.digest, pss, utils.Prehashed(hashes.SHA256()))
    if name == "decrypt":
        return key.decrypt(operation.decrypt.ciphertext, oaep)
    return key.public_key().encrypt(operation.encrypt.plaintext, oaep)


def sign_operation(digest: bytes | None = None) -> operation_pb2.Operation:
    return operation_pb2.Operation(
        request_id=secrets.token_bytes(16),
        sign=operation_pb2.SignOperation(
            scheme=operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256, digest=digest or secrets.token_bytes(32)
        ),
    )


def output_of(sealed: agent_pb2.SealedResults, operation: operation_pb2.Operation, vm: str) -> bytes:
    """What an agent does: verify, open, check."""
    verified = verify_container(sealed.container, rsa_key("container-authority").public_key(), 256)
    return check_result(
        parse_result_set(verified.open(sealed.content_key)),
        operation=operation,
        vmid=thumbprint(certificate(vm)),
        hvid=thumbprint(certificate("hypervisor")),
        now=time.time(),
    )


def require_signature(signature: bytes, operation: operation_pb2.Operation, vm: str) -> None:
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    rsa_key(vm).public_key().verify(signature, operation.sign.digest, pss, utils.Prehashed(hashes.SHA256()))


def request_for(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    """A CSR (DER) with a subject that must not count."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier("urn:uuid:" + "0" * 8 + "-0000" * 3 + "-" + "0" * 12)]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def pem_key(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


NAME_OVERRIDE = (("grpc.ssl_target_name_override", "secure-middleware"),)


@dataclass
class Guest:
    """The inside of a domain: what it was handed, and the agent's key."""

    folder: Path
    uuid: str
    join: dict[str, str]
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    certificate: bytes = b""

    @property
    def secret(self) -> bytes:
        return base64.urlsafe_b64decode(self.join["join_secret"] + "=")

    @property
    def authority(self) -> bytes:
        return self.join["guest_authority"].encode()

    def enrol_channel(self) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.authority)
        return grpc.aio.secure_channel(self.join["enrol"], credentials, NAME_OVERRIDE)

    def agent_channel(self, address: str | None = None) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.authority, pem_key(self.key), pem_of(self.certificate))
        return grpc.aio.secure_channel(address or self.join["agent"], credentials, NAME_OVERRIDE)

    async def enrol(self, secret: bytes | None = None) -> agent_pb2.EnrolResponse:
        async with self.enrol_channel() as channel:
            response = await agent_pb2_grpc.EnrolmentServiceStub(channel).Enrol(
                agent_pb2.EnrolRequest(
                    join_secret=self.secret if secret is None else secret,
                    certificate_signing_request=request_for(self.key),
                ),
                timeout=TIMEOUT,
            )
        self.certificate = response.certificate
        return response

    async def renew_ended(
        self, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None, *, public_key: bytes | None = None
    ) -> bytes:
        """As an agent whose certificate has ended: with its own key, or another one."""
        key = key or self.key
        known = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        async with self.enrol_channel() as channel:
            response = await agent_pb2_grpc.EnrolmentServiceStub(channel).RenewEnded(
                agent_pb2.RenewEndedRequest(
                    public_key=known if public_key is None else public_key,
                    certificate_signing_request=request_for(key),
                ),
                timeout=TIMEOUT,
            )
        self.certificate = response.certificate
        return response.certificate

    async def show_certificate(self) -> None:
        """The least that an agent does with it."""
        async with self.agent_channel() as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)

    @contextlib.asynccontextmanager
    async def agent(self, address: str | None = None) -> AsyncIterator[agent_pb2_grpc.AgentServiceAsyncStub]:
        async with self.agent_channel(address) as channel:
            yield agent_pb2_grpc.AgentServiceStub(channel)


class World:
    """``service`` runs between ``start`` and ``stop``; the state folder stays."""

    def __init__(self, folder: Path, *, hypervisor: str = "hypervisor") -> None:
        self.folder = folder
        self.grid = GridDouble(hypervisor=hypervisor)
        self.policy = folder / "policy.toml"
        self.policy.write_text(POLICY)
        (folder / "grid.pem").write_bytes(pem_of(der_of(grid_authority().certificate)))
        self.extra: dict[str, object] = {}
        # More of what MiddlewareService takes.
        self.parts: dict[str, object] = {}
        state = folder / "s"
        state.mkdir(mode=0o700)
        GuestAuthority.create(state, clock=time.time)
        orchestrators = OrchestratorAuthority.create(state, clock=time.time)
        orchestrators.add("admin")
        orchestrators.add("stranger")
        self.state = state
        self.clock_offset = 0.0
        self._service: MiddlewareService | None = None
        # Keeps the test driver's domains while the middleware is away, and acts on them behind its back.
        self.direct: libvirt.virConnect | None = None

    @property
    def service(self) -> MiddlewareService:
        assert self._service is not None
        return self._service

    @property
    def settings(self) -> MiddlewareSettings:
        raw = {
            "state": "s",
            "policy": "policy.toml",
            "card": {"socket": "card.sock", "user_pin_file": "pin"},
            "grid": {
                "service_provider": "https://localhost:8443",
                "operations": "localhost:8444",
                "openid_provider": "https://localhost:9443",
                "openid_login": "https://localhost:9444",
                "authority": "grid.pem",
            },
            "libvirt": {"heal_interval": 0.1},
            "audit": {"sync_interval": 0.1},
            **self.extra,
        }
        return validate_settings(MiddlewareSettings, raw, self.folder / "middleware.toml")

    async def start(self) -> None:
        self._service = MiddlewareService(
            self.settings,
            grid=self.grid,
            hypervisor_identity=HypervisorDouble(self.grid.hypervisor),
            clock=lambda: time.time() + self.clock_offset,
            **self.parts,  # type: ignore[arg-type]
        )
        await self._service.__aenter__()

    async def stop(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            await service.__aexit__(None, None, None)

    def hold_hypervisor(self) -> libvirt.virConnect:
        if self.direct is None:
            self.direct = libvirt.open("test:///default")
        return self.direct

    def orchestrator_channel(self, name: str = "admin") -> grpc.aio.Channel:
        certificate_path, key_path = credential_paths(self.state, name)
        credentials = grpc.ssl_channel_credentials(
            (self.state / "orchestrator-authority.pem").read_bytes(),
            key_path.read_bytes(),
            certificate_path.read_bytes(),
        )
        return grpc.aio.secure_channel(f"unix:{self.state}/orchestrator.sock", credentials, NAME_OVERRIDE)

    @contextlib.asynccontextmanager
    async def orchestrator(
        self, name: str = "admin"
    ) -> AsyncIterator[orchestrator_pb2_grpc.OrchestratorServiceAsyncStub]:
        async with self.orchestrator_channel(name) as channel:
            yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)

    async def create(self, vm: str = "web", **overrides: object) -> str:
        """A VM, not started; its UUID."""
        request = orchestrator_pb2.CreateVmRequest(
            **{"name": vm, "vm_certificate": certificate(vm), "vm_auth_token": token(vm), **overrides}
        )
        async with self.orchestrator() as stub:
            return (await stub.CreateVm(request, timeout=TIMEOUT)).vm.uuid

    async def boot(self, uuid: str) -> Guest:
        async with self.orchestrator() as stub:
            response = await stub.StartVm(orchestrator_pb2.StartVmRequest(uuid=uuid), timeout=TIMEOUT)
        folder = Path(response.guest_channel)
        return Guest(folder, uuid, json.loads((folder / "join.json").read_text()))

    async def enrolled(self, vm: str = "web", **overrides: object) -> Guest:
        """A running VM whose agent has its certificate."""
        guest = await self.boot(await self.create(vm, **overrides))
        await guest.enrol()
        await guest.show_certificate()
        return guest

    def audit(self) -> list[dict[str, object]]:
        self.service.audit.flush()
        return [json.loads(line) for line in (self.state / "audit.jsonl").read_text().splitlines()]


def _forget_domains() -> None:
    """The test driver lives as long as anything in this process refers to it: another test's domains may still be there."""
    connection = libvirt.open("test:///default")
    for domain in connection.listAllDomains():
        if domain.name() != "test":
            if domain.isActive():
                domain.destroy()
            domain.undefine()
    connection.close()


@contextlib.asynccontextmanager
async def running_world(**extra: object) -> AsyncIterator[World]:
    """``extra``: more tables of the settings."""
    # A short path: Unix sockets.
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as folder:
        world = World(Path(folder))
        world.extra.update(extra)
        try:
            _forget_domains()
            await world.start()
            yield world
        finally:
            await world.stop()
            if world.direct is not None:
                world.direct.close()


def facts(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, float | None]:
    """Code, reason and seconds to wait of a refusal; the status proto must agree with the code."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    assert status.code == error.code().value[0]
    reason, wait = "", None
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
            assert info.domain in ("middleware.secfunet", "gose.secfunet")
        elif detail.Unpack(retry):
            wait = retry.retry_delay.ToTimedelta().total_seconds()
    return error.code(), reason, wait


async def eventually(condition: object, *, within: float = 5.0) -> None:
    """Waits until ``condition()`` holds."""
    end = asyncio.get_running_loop().time() + within
    while not condition():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < end, "it did not come true in time"
        await asyncio.sleep(0.01)
