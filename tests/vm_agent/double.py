"""A Secure Middleware for tests: real gRPC with real mutual TLS, real keys and real containers, and faults on demand.

It does with keys in its own memory what dom0, grid and card do together; only that is not real. What an attacker or a fault would do, a
test does by replacing ``answer`` or by the switches.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID
from google.rpc import error_details_pb2, status_pb2

from secfunet.container import ContainerSealer, unwrap_content_key
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import thumbprint
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from secfunet.operation import request_digest
from secfunet.rpc.facts import STATUS_KEY, Facts

SERVER_NAME = "secure-middleware"
DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM
_HASHES = {32: hashes.SHA256(), 48: hashes.SHA384(), 64: hashes.SHA512()}


def make_certificate(
    name: str,
    public_key: Any,
    signer: Any,
    issuer: str | None = None,
    *,
    sans: list[x509.GeneralName] | None = None,
    ca: bool = False,
    life: float = 3600.0,
    age: float = 5.0,
) -> x509.Certificate:
    """A certificate that began ``age`` seconds ago and ends ``life`` seconds from now."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer or name)]))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=age))
        .not_valid_after(now + timedelta(seconds=life))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    return builder.sign(signer, hashes.SHA256())


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@dataclass
class Grid:
    """The keys of one VM, its hypervisor and the container authority."""

    vm: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = field(default_factory=rsa_key)
    hypervisor: rsa.RSAPrivateKey = field(default_factory=rsa_key)
    authority: rsa.RSAPrivateKey = field(default_factory=rsa_key)

    def __post_init__(self) -> None:
        self.vm_certificate = make_certificate("vm", self.vm.public_key(), self.vm).public_bytes(DER)
        self.hypervisor_certificate = make_certificate(
            "hypervisor", self.hypervisor.public_key(), self.hypervisor
        ).public_bytes(DER)
        self.authority_certificate = make_certificate(
            "authority", self.authority.public_key(), self.authority
        ).public_bytes(DER)
        self.sealer = ContainerSealer(self.hypervisor.public_key(), self.authority)

    def identity(self) -> agent_pb2.Identity:
        return agent_pb2.Identity(
            vm_certificate=self.vm_certificate,
            container_authority=self.authority_certificate,
            hypervisor_certificate=self.hypervisor_certificate,
            authorised_until=int(time.time()) + 3600,
            operations=["sign", "decrypt", "encrypt"],
        )

    def execute(self, operation: operation_pb2.Operation) -> bytes:
        """What a card would do."""
        match operation.WhichOneof("kind"):
            case "sign":
                algorithm = _HASHES[len(operation.sign.digest)]
                if isinstance(self.vm, ec.EllipticCurvePrivateKey):
                    return self.vm.sign(operation.sign.digest, ec.ECDSA(utils.Prehashed(algorithm)))
                if operation.sign.scheme <= operation_pb2.SIGNATURE_SCHEME_RSASSA_PKCS1_V1_5_SHA512:
                    return self.vm.sign(operation.sign.digest, padding.PKCS1v15(), utils.Prehashed(algorithm))
                pss = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
                return self.vm.sign(operation.sign.digest, pss, utils.Prehashed(algorithm))
            case "decrypt":
                assert isinstance(self.vm, rsa.RSAPrivateKey)
                return self.vm.decrypt(operation.decrypt.ciphertext, _oaep())
            case _:
                assert isinstance(self.vm, rsa.RSAPrivateKey)
                return self.vm.public_key().encrypt(operation.encrypt.plaintext, _oaep())

    def results(self, operations: list[operation_pb2.Operation]) -> operation_pb2.ResultSet:
        """A ResultSet as the grid makes it."""
        return operation_pb2.ResultSet(
            vmid=thumbprint(self.vm_certificate),
            hvid=thumbprint(self.hypervisor_certificate),
            time=int(time.time()),
            results=[
                operation_pb2.Result(
                    request_id=operation.request_id,
                    request_digest=request_digest(operation),
                    output=self.execute(operation),
                )
                for operation in operations
            ],
        )

    def seal(self, results: operation_pb2.ResultSet) -> agent_pb2.SealedResults:
        """A container as the grid makes it, with the content key as the hypervisor's card unwraps it."""
        container = self.sealer.seal(results.SerializeToString())
        return agent_pb2.SealedResults(
            container=container, content_key=unwrap_content_key(self.hypervisor, container[:256])
        )

    def answer(self, request: agent_pb2.OperateRequest) -> agent_pb2.OperateResponse:
        sealed = self.seal(self.results(list(request.operations)))
        return agent_pb2.OperateResponse(batch_id=request.batch_id, results=[sealed])


def _oaep() -> padding.OAEP:
    return padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


def _spki(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return holder.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)


Answerer = Callable[[agent_pb2.OperateRequest], Awaitable[list[agent_pb2.OperateResponse]]]


class MiddlewareDouble(agent_pb2_grpc.EnrolmentServiceServicer, agent_pb2_grpc.AgentServiceServicer):
    """One domain's pair of servers; an async context manager."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder = folder
        self.grid = grid
        self.uuid = "6f1d3a52-96a1-4b0c-9d7e-5f1f0c0a7b11"
        self.authority_key = ec.generate_private_key(ec.SECP256R1())
        self.authority = make_certificate("guests", self.authority_key.public_key(), self.authority_key, ca=True)
        self.join_secret = secrets.token_bytes(32)
        self.join_key = b""  # that the secret belongs to
        self.life, self.age = 3600.0, 5.0  # of the agents' certificates
        self.serials: set[int] = set()
        self.enrolments = 0
        self.renewals = 0
        self.late_renewals = 0
        self.renews_ended = True
        self.agent_key = b""  # of the last certificate
        self.batches: list[agent_pb2.OperateRequest] = []
        self.streams = 0
        self.lost = 0  # so many answers to Enrol are lost, though the secret was taken
        self.paused = 0  # so many requests to enrol find the domain paused
        self.refuse: grpc.StatusCode | None = None  # every stream
        self.refuse_identity: grpc.StatusCode | None = None  # every stream
        self.only_newest_serial = False
        self.answer: Answerer = self._answer
        self.identity = grid.identity()
        self.identity_changed = asyncio.Event()
        self.latency = 0.0
        self.broken: Facts | None = None  # what a probe finds
        self.probes = 0
        self.clock_offset = 0.0  # of the grid's clock
        self._servers: list[grpc.aio.Server] = []

    async def _answer(self, request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        if self.latency:
            await asyncio.sleep(self.latency)
        return [self.grid.answer(request)]

    @property
    def join_json(self) -> Path:
        return self.folder / "join.json"

    def invite(self) -> None:
        """What dom0 hands to the domain when it starts."""
        self.join_secret, self.join_key = secrets.token_bytes(32), b""
        information = {
            "uuid": self.uuid,
            "join_secret": base64.urlsafe_b64encode(self.join_secret).rstrip(b"=").decode(),
            "guest_authority": self.authority.public_bytes(PEM).decode(),
            "enrol": f"unix:{self.folder / 'enrol.sock'}",
            "agent": f"unix:{self.folder / 'mw.sock'}",
            "server_name": SERVER_NAME,
        }
        self.join_json.touch(mode=0o600)
        self.join_json.write_text(json.dumps(information))

    async def __aenter__(self) -> MiddlewareDouble:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = make_certificate(
            "middleware", key.public_key(), self.authority_key, "guests", sans=[x509.DNSName(SERVER_NAME)]
        )
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        pair = [(private, certificate.public_bytes(PEM))]
        enrol, agent = grpc.aio.server(), grpc.aio.server()
        agent_pb2_grpc.add_EnrolmentServiceServicer_to_server(self, enrol)
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, agent)
        enrol.add_secure_port(f"unix:{self.folder / 'enrol.sock'}", grpc.ssl_server_credentials(pair))
        agent.add_secure_port(
            f"unix:{self.folder / 'mw.sock'}",
            grpc.ssl_server_credentials(pair, self.authority.public_bytes(PEM), require_client_auth=True),
        )
        for server in (enrol, agent):
            await server.start()
        self._servers = [enrol, agent]

    async def stop(self) -> None:
        """As a middleware that is killed: nothing is answered any more."""
        for server in self._servers:
            await server.stop(None)
        self._servers = []

    def certify(self, request: bytes) -> bytes:
        csr = x509.load_der_x509_csr(request)
        assert csr.is_signature_valid
        certificate = make_certificate(
            "agent",
            csr.public_key(),
            self.authority_key,
            "guests",
            sans=[x509.UniformResourceIdentifier(f"urn:uuid:{self.uuid}")],
            life=self.life,
            age=self.age,
        )
        if self.only_newest_serial:
            self.serials.clear()
        self.serials.add(certificate.serial_number)
        self.agent_key = _spki(csr)
        return certificate.public_bytes(DER)

    async def Probe(self, request: Any, context: Any) -> agent_pb2.ProbeResponse:  # noqa: N802
        self.probes += 1
        if self.broken is not None:
            await context.abort(self.broken.code, self.broken.message, trailing_metadata=self._details(self.broken))
        return agent_pb2.ProbeResponse(time=int(time.time() + self.clock_offset))

    @staticmethod
    def _details(facts: Facts) -> tuple[tuple[str, bytes], ...]:
        return ((STATUS_KEY, facts.status().SerializeToString()),)

    async def Enrol(self, request: Any, context: Any) -> agent_pb2.EnrolResponse:  # noqa: N802
        if self.paused:
            self.paused -= 1
            code, message = grpc.StatusCode.FAILED_PRECONDITION, "the domain of this channel does not run"
            status = status_pb2.Status(code=code.value[0], message=message)
            status.details.add().Pack(
                error_details_pb2.ErrorInfo(reason="DOMAIN_NOT_RUNNING", domain="middleware.secfunet")
            )
            await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))
        if not secrets.compare_digest(request.join_secret, self.join_secret):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this join secret is not known")
        spki = _spki(x509.load_der_x509_csr(request.certificate_signing_request))
        if self.join_key not in (b"", spki):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this join secret belongs to another key")
        self.join_key = spki
        self.enrolments += 1
        if self.lost:
            self.lost -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the channel broke")
        return agent_pb2.EnrolResponse(
            certificate=self.certify(request.certificate_signing_request),
            guest_authority=self.authority.public_bytes(DER),
            identity=self.identity,
        )

    async def RenewEnded(self, request: Any, context: Any) -> agent_pb2.RenewEndedResponse:  # noqa: N802
        csr = x509.load_der_x509_csr(request.certificate_signing_request)
        if not self.renews_ended or not self.agent_key or {request.public_key, _spki(csr)} != {self.agent_key}:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no certificate of this run is for that key")
        self.late_renewals += 1
        return agent_pb2.RenewEndedResponse(certificate=self.certify(request.certificate_signing_request))

    async def RenewCertificate(self, request: Any, context: Any) -> agent_pb2.RenewCertificateResponse:  # noqa: N802
        await self._check(context)
        self.renewals += 1
        return agent_pb2.RenewCertificateResponse(certificate=self.certify(request.certificate_signing_request))

    async def GetIdentity(self, request: Any, context: Any) -> agent_pb2.GetIdentityResponse:  # noqa: N802
        await self._check(context)
        if self.refuse_identity is not None:
            await context.abort(self.refuse_identity, "the VM-Auth-Token is refused")
        return agent_pb2.GetIdentityResponse(identity=self.identity)

    async def WatchIdentity(self, request: Any, context: Any) -> AsyncIterator[agent_pb2.WatchIdentityResponse]:  # noqa: N802
        await self._check(context)
        while True:
            self.identity_changed.clear()
            yield agent_pb2.WatchIdentityResponse(identity=self.identity)
            await self.identity_changed.wait()

    async def Operate(self, request_iterator: Any, context: Any) -> AsyncIterator[agent_pb2.OperateResponse]:  # noqa: N802
        await self._check(context)
        if self.refuse is not None:
            await context.abort(self.refuse, "refused by the test")
        self.streams += 1
        answers: asyncio.Queue[list[agent_pb2.OperateResponse] | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()

        async def one(request: agent_pb2.OperateRequest) -> None:
            answers.put_nowait(await self.answer(request))

        async def read() -> None:
            async for request in request_iterator:
                self.batches.append(request)
                task = asyncio.create_task(one(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)
            answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (ready := await answers.get()) is not None:
                for response in ready:
                    yield response
        finally:
            for task in (reader, *tasks):
                task.cancel()

    async def _check(self, context: Any) -> None:
        """Mutual TLS really happened, with a certificate that is still good."""
        certificate = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0])
        if certificate.serial_number not in self.serials:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this certificate is not good any more")
        if self.join_key == _spki(certificate):
            self.join_secret = b""  # forgotten: it did what it was for
