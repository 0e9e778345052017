"""The agent as a whole against the middleware's double: enrolment, operations, renewal, loss and return of dom0."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, utils

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import thumbprint
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import Grid, MiddlewareDouble
from vm_agent.errors import facts_of
from vm_agent.options import AgentOptions
from vm_agent.server import AgentService

PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
OAEP = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256
DIGEST = hashlib.sha256(b"what is signed").digest()
SIGN = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=PSS, digest=DIGEST))


@asynccontextmanager
async def running(options: AgentOptions) -> AsyncIterator[tuple[AgentService, local_pb2_grpc.LocalServiceStub]]:
    async with (
        AgentService(options) as service,
        grpc.aio.insecure_channel(f"unix:{options.socket}", [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield service, local_pb2_grpc.LocalServiceStub(channel)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return facts_of(value).reason
    return ""


async def test_enrols_signs_and_erases_the_join_secret(
    middleware: MiddlewareDouble, options: AgentOptions, grid: Grid
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        answer = await stub.Sign(SIGN, timeout=5)
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        grid.vm.public_key().verify(answer.signature, DIGEST, pss, utils.Prehashed(hashes.SHA256()))
        identity = await stub.GetIdentity(local_pb2.GetIdentityRequest(), timeout=5)
        status = await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=5)
    assert identity.vmid == thumbprint(grid.vm_certificate)
    assert status.enrolled
    assert status.connected
    assert status.problem == ""
    assert not middleware.join_json.exists()
    kept = options.state / "enrolment.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(options.state.stat().st_mode) == 0o700


async def test_encrypt_then_decrypt(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options) as (_, stub):
        operation = operation_pb2.EncryptOperation(scheme=OAEP, plaintext=b"short")
        sealed = await stub.Encrypt(local_pb2.EncryptRequest(encrypt=operation), timeout=5, wait_for_ready=True)
        back = operation_pb2.DecryptOperation(scheme=OAEP, ciphertext=sealed.ciphertext)
        opened = await stub.Decrypt(local_pb2.DecryptRequest(decrypt=back), timeout=5)
    assert opened.plaintext == b"short"
