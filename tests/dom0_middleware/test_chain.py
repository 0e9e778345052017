"""A VM's operation, from its agent's call to a container that verifies."""

from __future__ import annotations

import secrets

from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from tests.dom0_middleware.world import (
    TIMEOUT,
    World,
    certificate,
    output_of,
    require_signature,
    sign_operation,
)


async def test_sign_comes_back_in_a_container_that_verifies(world: World) -> None:
    guest = await world.enrolled()
    operation = sign_operation()
    async with guest.agent() as stub:
        response = await stub.Sign(
            agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT
        )
    require_signature(output_of(response.results, operation, "web"), operation, "web")


async def test_encrypt_then_decrypt(world: World) -> None:
    guest = await world.enrolled()
    oaep = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256
    encrypt = operation_pb2.Operation(
        request_id=secrets.token_bytes(16), encrypt=operation_pb2.EncryptOperation(scheme=oaep, plaintext=b"attack")
    )
    async with guest.agent() as stub:
        sealed = await stub.Encrypt(
            agent_pb2.EncryptRequest(request_id=encrypt.request_id, encrypt=encrypt.encrypt), timeout=TIMEOUT
        )
        decrypt = operation_pb2.Operation(
            request_id=secrets.token_bytes(16),
            decrypt=operation_pb2.DecryptOperation(scheme=oaep, ciphertext=output_of(sealed.results, encrypt, "web")),
        )
        opened = await stub.Decrypt(
            agent_pb2.DecryptRequest(request_id=decrypt.request_id, decrypt=decrypt.decrypt), timeout=TIMEOUT
        )
    assert output_of(opened.results, decrypt, "web") == b"attack"
    assert world.grid.logins == 1


async def test_identity(world: World) -> None:
    guest = await world.boot(await world.create())
    enrolled = await guest.enrol()
    async with guest.agent() as stub:
        identity = (await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)).identity
    assert identity == enrolled.identity
    assert identity.vm_certificate == certificate("web")
    assert identity.hypervisor_certificate == certificate("hypervisor")
    assert identity.container_authority == certificate("container-authority")
    assert list(identity.operations) == ["decrypt", "encrypt", "sign"]
