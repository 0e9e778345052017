"""The attacks of the story, performed with what an attacker would have. Each returns how it was refused, or raises AttackSucceededError."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509

from demo.processes import Daemon, run
from demo.stack import Stack
from gose_client import GoseClient, GoseClientError, GoseClientSettings
from secfunet.card import CardOpener, CardPort, SingleCard
from secfunet.card.place import connect_card
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import der_of, load_certificate
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from vm_agent.batching import Ticket
from vm_agent.enrolment import Enrolment
from vm_agent.errors import AnswerRefusedError
from vm_agent.identity import parse_identity
from vm_agent.results import ResultChecker

SCHEME = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
TARGET = ("grpc.ssl_target_name_override", "secure-middleware")


class AttackSucceededError(SecFuNetError):
    """What must never happen."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an attack ended: who refused, and with what words."""

    by: str
    words: str


def enrolment_of(stack: Stack, vm: str) -> Enrolment:
    """What somebody has who copied the disk of ``vm``: the agent's key and certificate, and no more."""
    kept = stack.layout.guest(vm) / "state" / "enrolment.json"
    return Enrolment.from_json(kept.read_bytes())


def sign_operation(digest: bytes) -> operation_pb2.Operation:
    """A signature over ``digest`` (32 bytes), with a fresh request id."""
    sign = operation_pb2.SignOperation(scheme=SCHEME, digest=digest)
    return operation_pb2.Operation(request_id=os.urandom(16), sign=sign)


async def sealed_signature(
    enrolment: Enrolment, channel_of: Enrolment, operation: operation_pb2.Operation
) -> agent_pb2.SealedResults:
    """Asks the middleware on the channel of one domain with the certificate of ``enrolment``, without any agent of ours between."""
    async with grpc.aio.secure_channel(channel_of.agent, enrolment.credentials(), options=[TARGET]) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
        response = await stub.Sign(request, timeout=10)
    return response.results


async def neighbour(stack: Stack, attacker: str, victim: str) -> Refusal:
    """Another VM, with its own valid certificate, on the victim's channel (as if it had got hold of that too)."""
    operation = sign_operation(os.urandom(32))
    try:
        await sealed_signature(enrolment_of(stack, attacker), enrolment_of(stack, victim), operation)
    except grpc.aio.AioRpcError as error:
        return Refusal("the Secure Middleware", f"{error.code().name}: {error.details()}")
    raise AttackSucceededError(f"{attacker} used the key of {victim}")


async def foreign_hypervisor(stack: Stack, vm: str, thief: str) -> Refusal:
    """Another hypervisor of the same grid, with its own card, presents the token that names ``stack.host``."""
    layout = stack.layout
    pin = (layout.card(thief) / "user.pin").read_bytes().strip()

    async def connect() -> CardPort:
        return await connect_card(stack.place(thief), timeout=5)

    ports = stack.ports
    settings = GoseClientSettings(
        service_provider=f"https://localhost:{ports.sp_https}",
        operations=f"localhost:{ports.sp_grpc}",
        openid_provider=f"https://localhost:{ports.op_endpoint}",
        openid_login=f"https://localhost:{ports.op_login}",
        authority=layout.grid_authority,
    )
    certificate = der_of(load_certificate(layout.certificate(vm).read_bytes()))
    token = layout.token(vm, stack.host).read_text().strip()
    card = SingleCard(CardOpener(connect, lambda: pin, identity="hypervisor"))
    try:
        async with GoseClient(settings, card) as client:
            await client.open_session(certificate, token, timeout=20)
    except GoseClientError as error:
        return Refusal("the grid's service provider", str(error))
    finally:
        await card.close()
    raise AttackSucceededError(f"{thief} opened a session for {vm}")


async def replayed_container(stack: Stack, vm: str) -> Refusal:
    """A valid container of yesterday's question as the answer to today's: what a forged middleware or a man in the middle would try."""
    enrolment = enrolment_of(stack, vm)
    async with grpc.aio.secure_channel(enrolment.agent, enrolment.credentials(), options=[TARGET]) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        identity = parse_identity((await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=10)).identity)
    asked, wanted = sign_operation(os.urandom(32)), sign_operation(os.urandom(32))
    sealed = await sealed_signature(enrolment, enrolment, asked)
    checker = ResultChecker(identity=identity)
    answer = agent_pb2.OperateResponse(results=[sealed])
    honest = checker.settle([Ticket(asked.request_id, asked)], answer)[asked.request_id]
    if isinstance(honest, Exception):
        raise AttackSucceededError(
            "the container was not even valid for its own request: nothing is shown by this"
        ) from honest
    outcome = checker.settle([Ticket(wanted.request_id, wanted)], answer)[wanted.request_id]
    if isinstance(outcome, AnswerRefusedError):
        return Refusal("the agent", f"{outcome} ({len(sealed.container)} bytes, trailer valid, another request)")
    raise AttackSucceededError("a container passed for the answer to another request")


async def copied_image(stack: Stack, vm: str) -> Refusal:
    """The VM's disk, copied; its domain is destroyed, and the copy is booted somewhere else."""
    layout = stack.layout
    copy = layout.folder / "vms" / f"{vm}-copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(layout.guest(vm), copy, ignore=_sockets)
    await stack.daemons[f"agent-{vm}"].kill()
    await stack.middleware("vm", "stop", vm, "--force")
    agent = Daemon(
        f"agent-{vm}-copy", ("vm-agent", "serve", "--config", copy / "vm-agent.toml"), layout.log(f"{vm}-copy")
    )
    try:
        await agent.start(timeout=10)
        words = ("sign", "-", "--timeout", "3", "--config", copy / "vm-agent.toml")
        finished = await run("vm-agent", *words, input_data=b"give me your name", check=False)
    finally:
        await agent.stop()
        shutil.rmtree(copy)
    if finished.exit_code == 0 or finished.output:
        raise AttackSucceededError("a copied image used the key")
    return Refusal("no channel leads anywhere", f"exit code {finished.exit_code}, {finished.errors.strip()}")


def _sockets(folder: str, names: list[str]) -> list[str]:
    """No disk image holds a socket that somebody listens on."""
    return [name for name in names if (Path(folder) / name).is_socket()]


def public_key_pem(certificate: Path) -> bytes:
    """What anybody needs to verify: the public key in a certificate."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
