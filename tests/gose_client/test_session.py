"""The main road: a hypervisor logs in with its card, opens a session for a VM, and runs operations."""

from __future__ import annotations

import asyncio
import secrets
import time

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from gose_client import ContainerRefusedError, GridRefusedError, RequestInvalidError, SessionClosedError
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate, rsa_key_of, thumbprint
from secfunet.operation import request_digest
from tests.gose.grid import sign_operation
from tests.gose_client.conftest import Host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


async def test_a_signature_by_the_vms_key_comes_out_of_a_container_of_the_grid(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        assert session.vmid == host.grid.vms["vm-1"].thumbprint
        assert session.hvid == host.hvid == thumbprint(host.certificate)
        assert session.operations == {"sign", "decrypt", "encrypt"}
        assert time.time() < session.expires_at <= time.time() + 3600
        operation = sign_operation()
        answer = await session.execute([operation], timeout=10)
        assert not answer.failures
        (container,) = answer.containers
        (result,) = (await host.open(client, session, container)).results
        assert result.request_id == operation.request_id
        assert result.request_digest == request_digest(operation)
        rsa_key_of(load_certificate(host.grid.vms["vm-1"].certificate)).verify(
            result.output,
            operation.sign.digest,
            padding.PSS(padding.MGF1(hashes.SHA256()), 32),
            Prehashed(hashes.SHA256()),
        )
        await session.close()
        with pytest.raises(SessionClosedError):
            await session.execute([sign_operation()], timeout=5)


async def test_many_callers_share_one_stream_one_connection_and_one_content_key(host: Host) -> None:
    async with host.grid.running() as service, host.client() as client:
        session = await host.session(client)
        before = host.leases
        batches = [[sign_operation() for _ in range(1 + number % 5)] for number in range(40)]
        answers = await asyncio.gather(*(session.execute(batch, timeout=30) for batch in batches))
        assert service.metrics.streams._value.get() == 1
        for batch, answer in zip(batches, answers, strict=True):
            assert not answer.failures
            opened = await asyncio.gather(*(host.open(client, session, one) for one in answer.containers))
            assert {bytes(result.request_id) for results in opened for result in results.results} == {
                operation.request_id for operation in batch
            }
        assert client._keys.unwrapped == 1
        assert host.leases == before, "the card was connected once"


async def test_more_operations_than_fit_into_a_batch_go_out_as_several(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        operations = [sign_operation() for _ in range(150)]
        answer = await session.execute(operations, timeout=30)
        assert not answer.failures
        opened = [await host.open(client, session, container) for container in answer.containers]
        assert {bytes(result.request_id) for results in opened for result in results.results} == {
            operation.request_id for operation in operations
        }


async def test_an_operation_that_is_asked_twice_is_executed_once(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        operation = sign_operation()
        first = await session.execute([operation], timeout=10)
        again = await session.execute([operation], timeout=10)
        assert again.containers == first.containers  # PSS is salted: a second execution would differ
        other = sign_operation(request_id=operation.request_id)
        (failure,) = (await session.execute([other], timeout=10)).failures
        assert failure.reason == "REQUEST_ID_REUSED"


async def test_what_fails_alone_does_not_touch_the_others(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        good, bad = sign_operation(), sign_operation(secrets.token_bytes(20))
        answer = await session.execute([good, bad], timeout=10)
        assert [(failure.request_id, failure.reason) for failure in answer.failures] == [
            (bad.request_id, "OPERATION_INVALID")
        ]
        (result,) = (await host.open(client, session, answer.containers[0])).results
        assert result.request_id == good.request_id


async def test_a_request_that_is_none_is_refused_here(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        operation = sign_operation()
        for operations in ([], [operation, operation]):
            with pytest.raises(RequestInvalidError):
                await session.execute(operations, timeout=5)


async def test_the_login_of_one_session_serves_the_next(host: Host) -> None:
    async with host.grid.running() as service, host.client() as client:
        first = await host.session(client, "vm-1")
        second = await host.session(client, "vm-2")
        assert (first.vmid, second.vmid) == tuple(host.grid.vms[name].thumbprint for name in ("vm-1", "vm-2"))
        assert service.metrics.logins.labels("OK")._value.get() == 1
        assert service.metrics.sessions_granted._value.get() == 2
        # Each session has its own VM's key.
        for name, session in (("vm-1", first), ("vm-2", second)):
            answer = await session.execute([sign_operation()], timeout=10)
            await host.open(client, session, answer.containers[0], name)


async def test_logins_at_the_same_time_do_not_take_each_others_cookies(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        sessions = await asyncio.gather(*(host.session(client, f"vm-{1 + number % 2}") for number in range(6)))
        assert {session.vmid for session in sessions} == {vm.thumbprint for vm in host.grid.vms.values()}


async def test_a_token_for_another_vm_or_hypervisor_or_too_few_operations(host: Host) -> None:
    host.grid.hypervisor("hv-a")
    async with host.grid.running(), host.client() as client:
        certificate = host.grid.vms["vm-1"].certificate
        for token in (host.token("vm-2"), host.grid.token("vm-1", "hv-a"), "nonsense"):
            begun = time.monotonic()
            with pytest.raises(GridRefusedError) as refused:
                await client.open_session(certificate, token, timeout=10)
            assert refused.value.reason == "TOKEN_REFUSED"
            assert refused.value.code.name == "PERMISSION_DENIED"
            assert refused.value.from_grid
            assert time.monotonic() - begun < 3, "a refusal is not tried again"
        session = await client.open_session(certificate, host.token(operations=("decrypt",)), timeout=10)
        assert session.operations == {"decrypt"}
        (failure,) = (await session.execute([sign_operation()], timeout=10)).failures
        assert failure.reason == "OPERATION_NOT_ALLOWED"


async def test_a_container_is_verified_before_the_card_sees_its_header(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        (container,) = (await session.execute([sign_operation()], timeout=10)).containers
        for position in (0, 255, 256, 300, len(container) - 1):
            altered = bytearray(container)
            altered[position] ^= 1
            with pytest.raises(ContainerRefusedError):
                await client.content_key(bytes(altered), timeout=5)
        for wrong in (b"", container[:-1], container[1:], container + b"\0" * 16):
            with pytest.raises(ContainerRefusedError):
                await client.content_key(wrong, timeout=5)
        assert client._keys.unwrapped == 0
        keys = await asyncio.gather(*(client.content_key(container, timeout=5) for _ in range(20)))
        assert len(set(keys)) == 1
        assert client._keys.unwrapped == 1
        assert keys[0].hex() not in repr(client._keys)


async def test_the_secret_of_a_session_is_in_no_representation(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        assert session._grant.secret not in repr(session) + repr(session._grant) + repr(client)


async def test_decryption_and_encryption(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        message = b"for the VM alone"
        encrypt = operation_pb2.Operation(
            request_id=secrets.token_bytes(16),
            encrypt=operation_pb2.EncryptOperation(
                scheme=operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256, plaintext=message
            ),
        )
        (container,) = (await session.execute([encrypt], timeout=10)).containers
        (result,) = (await host.open(client, session, container)).results
        decrypt = operation_pb2.Operation(
            request_id=secrets.token_bytes(16),
            decrypt=operation_pb2.DecryptOperation(
                scheme=operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256, ciphertext=result.output
            ),
        )
        (container,) = (await session.execute([decrypt], timeout=10)).containers
        (result,) = (await host.open(client, session, container)).results
        assert result.output == message
