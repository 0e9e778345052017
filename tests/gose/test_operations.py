"""The gRPC door of a running grid: who may call, what comes back, and what happens when a card or the grid dies."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from gose.server import SERVICE_NAME, GridService
from secfunet.gose.v1 import operation_pb2, service_provider_pb2
from secfunet.identity import Role, load_certificate
from secfunet.operation import check_result
from tests.gose.grid import TestGrid, free_ports, restart, sign_operation

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def service(grid: TestGrid) -> AsyncIterator[GridService]:
    async with grid.running(card_backoff_max=0.3, card_connect_timeout=1.0, operation_timeout=1.0) as service:
        yield service


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason of the ErrorInfo; checks the domain."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "gose.secfunet"
    return str(info.reason)


def retry_of(error: grpc.aio.AioRpcError) -> float:
    """The delay of the RetryInfo, seconds."""
    status = rpc_status.from_call(error)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    return float(retry.retry_delay.ToMicroseconds()) / 1e6


def execute(*operations: operation_pb2.Operation) -> service_provider_pb2.ExecuteRequest:
    return service_provider_pb2.ExecuteRequest(operations=operations)


def under(session: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return (("secfunet-session", session["session"]),)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a unary call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value)


async def exchange(call: Any, *operations: operation_pb2.Operation, batch_id: int = 1) -> Any:
    """One batch over a stream, and the next answer."""
    await call.write(service_provider_pb2.ExecuteStreamRequest(batch_id=batch_id, operations=operations))
    answer = await asyncio.wait_for(call.read(), 5)
    assert answer is not grpc.aio.EOF, "the stream has ended in peace"
    return answer


async def read_to_the_end(call: Any) -> None:
    """Until the status."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def refused_stream(stub: Any, metadata: Any, *operations: operation_pb2.Operation) -> tuple[grpc.StatusCode, str]:
    """How a stream is refused."""
    call = stub.ExecuteStream(metadata=metadata)
    return await refused(exchange(call, *operations))


async def until_back(stub: Any, session: dict[str, Any], operation: operation_pb2.Operation) -> Any:
    """Asks as long as the card is out of service, at most ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return await stub.Execute(execute(operation), timeout=5, metadata=under(session))
        except grpc.aio.AioRpcError as error:
            if reason_of(error) != "CARD_UNAVAILABLE":
                raise
            await asyncio.sleep(retry_of(error))
    raise AssertionError("the card does not come back")


def check_signature(grid: TestGrid, vm: str, digest: bytes, signature: bytes) -> None:
    key = load_certificate(grid.vms[vm].certificate).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    key.verify(signature, digest, padding.PSS(padding.MGF1(SHA256()), 32), utils.Prehashed(SHA256()))


async def test_a_batch_comes_back_in_one_container(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    operations = [sign_operation() for _ in range(5)]
    async with grid.channel("hv-a") as channel:
        answer = await grid.stub(channel).Execute(execute(*operations), timeout=5, metadata=under(session))
    assert len(answer.containers) == 1
    assert not answer.failures
    results = grid.open("hv-a", answer.containers[0])
    vmid, hvid = grid.vms["vm-1"].thumbprint, grid.hypervisor("hv-a").hvid
    for operation in operations:
        output = check_result(results, operation=operation, vmid=vmid, hvid=hvid, now=time.time())
        check_signature(grid, "vm-1", operation.sign.digest, output)
    with pytest.raises(InvalidSignature):
        check_signature(grid, "vm-2", operations[0].sign.digest, results.results[0].output)


async def test_encrypt_and_decrypt(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    scheme = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        there = operation_pb2.Operation(
            request_id=secrets.token_bytes(16), encrypt=operation_pb2.EncryptOperation(scheme=scheme, plaintext=b"x")
        )
        answer = await stub.Execute(execute(there), timeout=5, metadata=under(session))
        ciphertext = grid.open("hv-a", answer.containers[0]).results[0].output
        back = operation_pb2.Operation(
            request_id=secrets.token_bytes(16),
            decrypt=operation_pb2.DecryptOperation(scheme=scheme, ciphertext=ciphertext),
        )
        answer = await stub.Execute(execute(back), timeout=5, metadata=under(session))
    assert grid.open("hv-a", answer.containers[0]).results[0].output == b"x"


async def test_a_stolen_session_is_worth_nothing(
    grid: TestGrid, service: GridService, caplog: pytest.LogCaptureFixture
) -> None:
    stolen = await grid.session("vm-1", "hv-a")
    caplog.clear()
    async with grid.channel("hv-b") as channel:
        stub = grid.stub(channel)
        expected = (grpc.StatusCode.PERMISSION_DENIED, "HYPERVISOR_MISMATCH")
        with caplog.at_level(logging.WARNING):
            assert await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(stolen))) == expected
            assert await refused_stream(stub, under(stolen), sign_operation()) == expected
            for method, request in (
                (stub.GetSession, service_provider_pb2.GetSessionRequest()),
                (stub.CloseSession, service_provider_pb2.CloseSessionRequest()),
            ):
                assert await refused(method(request, timeout=5, metadata=under(stolen))) == expected
    logged = [record for record in caplog.records if getattr(record, "reason", "") == "HYPERVISOR_MISMATCH"]
    assert 1 <= len(logged) <= 4, "a line a second says how many there were"
    assert stolen["session"] not in caplog.text
    assert all(grid.hypervisor("hv-b").hvid in record.cause for record in logged)  # type: ignore[attr-defined] # from extra
    # The owner's session has not suffered.
    async with grid.channel("hv-a") as channel:
        answer = await grid.stub(channel).Execute(execute(sign_operation()), timeout=5, metadata=under(stolen))
        assert len(answer.containers) == 1


async def test_without_a_session(grid: TestGrid, service: GridService) -> None:
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        request = execute(sign_operation())
        unauthenticated = grpc.StatusCode.UNAUTHENTICATED
        assert await refused(stub.Execute(request, timeout=5)) == (unauthenticated, "SESSION_REQUIRED")
        two = (("secfunet-session", "a"), ("secfunet-session", "b"))
        assert await refused(stub.Execute(request, timeout=5, metadata=two)) == (unauthenticated, "SESSION_REQUIRED")
        unknown = (("secfunet-session", "A" * 43),)
        assert await refused(stub.Execute(request, timeout=5, metadata=unknown)) == (unauthenticated, "SESSION_UNKNOWN")
        assert await refused_stream(stub, unknown, sign_operation()) == (unauthenticated, "SESSION_UNKNOWN")
        assert await refused_stream(stub, (), sign_operation()) == (unauthenticated, "SESSION_REQUIRED")


async def test_without_a_client_certificate_there_is_no_connection(grid: TestGrid, service: GridService) -> None:
    async with grid.channel(None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await grid.stub(channel).GetSession(service_provider_pb2.GetSessionRequest(), timeout=2)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_deadline_is_required(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    async with grid.channel("hv-a") as channel:
        call = grid.stub(channel).Execute(execute(sign_operation()), metadata=under(session))
        assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "DEADLINE_REQUIRED")


async def test_health_needs_no_session(grid: TestGrid, service: GridService) -> None:
    async with grid.channel("hv-a") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_is_not_watched(grid: TestGrid, service: GridService) -> None:
    async with grid.channel("hv-a") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert service.callers.calls == 0


async def test_health_counts_in_the_hypervisors_share(
    grid: TestGrid, service: GridService, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await grid.session("vm-1", "hv-a")
    monkeypatch.setattr(service.callers, "_calls_per_hypervisor", 1)
    request = health_pb2.HealthCheckRequest()
    async with grid.channel("hv-a") as channel, grid.channel("hv-b") as other:
        stream = grid.stub(channel).ExecuteStream(metadata=under(session))
        await stream.write(service_provider_pb2.ExecuteStreamRequest(batch_id=1, operations=[sign_operation()]))
        await stream.read()
        health = health_pb2_grpc.HealthStub(channel)
        expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert await refused(health.Check(request, timeout=5)) == expected
        assert await refused(health.Watch(request, timeout=5).read()) == expected
        assert (await health_pb2_grpc.HealthStub(other).Check(request, timeout=5)).status
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert (await health.Check(request, timeout=5)).status


async def test_failures_are_of_their_operation_only(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a", operations=("sign",))
    good = sign_operation()
    short = sign_operation()
    short.sign.digest = b"short"
    ecdsa = sign_operation()
    ecdsa.sign.scheme = operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256
    forbidden = operation_pb2.Operation(
        request_id=secrets.token_bytes(16),
        decrypt=operation_pb2.DecryptOperation(
            scheme=operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256, ciphertext=bytes(256)
        ),
    )
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        answer = await stub.Execute(execute(short, good, ecdsa, forbidden), timeout=5, metadata=under(session))
        results = grid.open("hv-a", answer.containers[0]).results
        assert [result.request_id for result in results] == [good.request_id]
        assert {failure.request_id: failure.reason for failure in answer.failures} == {
            short.request_id: "OPERATION_INVALID",
            ecdsa.request_id: "OPERATION_INVALID",
            forbidden.request_id: "OPERATION_NOT_ALLOWED",
        }
        invalid = (grpc.StatusCode.INVALID_ARGUMENT, "OPERATION_INVALID")
        for batch in ((), (good, good), (sign_operation(request_id=b"short"),), [sign_operation() for _ in range(65)]):
            assert await refused(stub.Execute(execute(*batch), timeout=5, metadata=under(session))) == invalid


async def test_a_retry_gets_the_first_answer(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    operation = sign_operation()
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        first = await stub.Execute(execute(operation), timeout=5, metadata=under(session))
        done = sum(slot.jobs_done for slot in service.rack.slots())
        # Beside another operation, under another session of the same VM, too.
        second_session = await grid.session("vm-1", "hv-a")
        again = await stub.Execute(execute(operation, sign_operation()), timeout=5, metadata=under(second_session))
        assert first.containers[0] in again.containers
        assert len(again.containers) == 2
        alone = await stub.Execute(execute(operation), timeout=5, metadata=under(session))
        assert list(alone.containers) == list(first.containers)
        # Only the login of the second session and the one new operation went to cards.
        assert sum(slot.jobs_done for slot in service.rack.slots()) - done <= 2
        other = sign_operation(request_id=operation.request_id)
        answer = await stub.Execute(execute(other), timeout=5, metadata=under(session))
        assert [failure.reason for failure in answer.failures] == ["REQUEST_ID_REUSED"]
        assert answer.failures[0].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_duplicates_at_the_same_time_join_the_first(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    operation = sign_operation()
    slot = next(slot for slot in service.rack.slots() if slot.seid == "se-vm-1")
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        before = slot.jobs_done
        answers = await asyncio.gather(
            *(stub.Execute(execute(operation), timeout=5, metadata=under(session)) for _ in range(20))
        )
    assert len({answer.containers[0] for answer in answers}) == 1
    assert slot.jobs_done - before == 1


async def test_another_vm_does_not_get_the_answer(grid: TestGrid, service: GridService) -> None:
    operation = sign_operation()
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        first = await stub.Execute(execute(operation), timeout=5, metadata=under(await grid.session("vm-1", "hv-a")))
        other = await stub.Execute(execute(operation), timeout=5, metadata=under(await grid.session("vm-2", "hv-a")))
    assert first.containers[0] != other.containers[0]
    assert grid.open("hv-a", other.containers[0]).vmid == grid.vms["vm-2"].thumbprint
    check_signature(grid, "vm-2", operation.sign.digest, grid.open("hv-a", other.containers[0]).results[0].output)


async def test_a_stream_carries_many_batches(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    batches = {number: sign_operation() for number in range(200)}
    async with grid.channel("hv-a") as channel:
        call = grid.stub(channel).ExecuteStream(metadata=under(session))

        async def write() -> None:
            for number, operation in batches.items():
                await call.write(service_provider_pb2.ExecuteStreamRequest(batch_id=number, operations=[operation]))
            await call.done_writing()

        writer = asyncio.create_task(write())
        answered = {}
        async for answer in call:
            assert not answer.failures
            answered[answer.batch_id] = answer
        await writer
    assert answered.keys() == batches.keys()
    headers = set()
    for number, operation in batches.items():
        result = grid.open("hv-a", answered[number].containers[0]).results[0]
        assert result.request_id == operation.request_id
        headers.add(answered[number].containers[0][:256])
    assert len(headers) == 1, "one content key serves the session's containers"


async def test_a_bad_batch_does_not_end_its_stream(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    async with grid.channel("hv-a") as channel:
        call = grid.stub(channel).ExecuteStream(metadata=under(session))
        answer = await exchange(call, batch_id=7)
        assert (answer.batch_id, [failure.reason for failure in answer.failures]) == (7, ["OPERATION_INVALID"])
        assert len((await exchange(call, sign_operation(), batch_id=8)).containers) == 1
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_reader_that_does_not_read_is_not_read_from(grid: TestGrid) -> None:
    async with grid.running(stream_batches=4) as service:
        session = await grid.session("vm-1", "hv-a")
        slot = next(slot for slot in service.rack.slots() if slot.seid == "se-vm-1")
        async with grid.channel("hv-a") as channel:
            call = grid.stub(channel).ExecuteStream(metadata=under(session))
            written = 0

            async def write() -> None:
                nonlocal written
                while True:
                    operations = [sign_operation() for _ in range(64)]
                    await call.write(service_provider_pb2.ExecuteStreamRequest(batch_id=written, operations=operations))
                    written += 1

            writer = asyncio.create_task(write())
            # Nobody reads: once the windows of flow control are full, neither caller nor grid goes on.
            settled = (-1, -1)
            for _ in range(40):
                await asyncio.sleep(0.5)
                if settled == (written, slot.jobs_done):
                    break
                settled = (written, slot.jobs_done)
            else:
                pytest.fail("the grid reads without end")
            assert slot.jobs_done > 0
            assert not writer.done()
            writer.cancel()
            call.cancel()


async def test_a_closed_session_ends(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        stream = stub.ExecuteStream(metadata=under(session))
        assert (await exchange(stream, sign_operation())).containers
        told = await stub.GetSession(service_provider_pb2.GetSessionRequest(), timeout=5, metadata=under(session))
        assert (told.vmid, told.hvid) == (grid.vms["vm-1"].thumbprint, grid.hypervisor("hv-a").hvid)
        assert list(told.operations) == ["decrypt", "encrypt", "sign"]
        await stub.CloseSession(service_provider_pb2.CloseSessionRequest(), timeout=5, metadata=under(session))
        unknown = (grpc.StatusCode.UNAUTHENTICATED, "SESSION_UNKNOWN")
        assert await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(session))) == unknown
        assert await refused(exchange(stream, sign_operation(), batch_id=2)) == unknown


@pytest.mark.parametrize("what", ["token", "vm", "hypervisor"])
async def test_a_revocation_counts_at_once(grid: TestGrid, service: GridService, what: str) -> None:
    """The registry is changed as ``gose revoke`` would, through a connection of its own."""
    hypervisor = f"hv-{what}"
    # A revoked VM stays revoked, so it is one that no other test uses.
    vm = "vm-revoked" if what == "vm" else "vm-1"
    session = await grid.session(vm, grid.hypervisor(hypervisor).name)
    async with grid.channel(hypervisor) as channel:
        stub = grid.stub(channel)
        stream = stub.ExecuteStream(metadata=under(session))
        assert (await exchange(stream, sign_operation())).containers
        with grid.registry() as registry:
            if what == "token":
                mine = [token for token in registry.tokens() if token.hvid == grid.hypervisor(hypervisor).hvid]
                registry.revoke_token(mine[0].jti)
            else:
                registry.revoke_identity(Role(what), vm if what == "vm" else hypervisor)
        expected = (grpc.StatusCode.PERMISSION_DENIED, f"{what.upper()}_REFUSED")
        assert await refused(exchange(stream, sign_operation(), batch_id=2)) == expected
        code, _ = await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(session)))
        assert code is grpc.StatusCode.UNAUTHENTICATED, "the session is gone"


async def test_a_killed_card_fails_clearly_and_comes_back(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    card = grid.cards["se-vm-1"]
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        await card.kill()
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Execute(execute(sign_operation()), timeout=5, metadata=under(session))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "CARD_UNAVAILABLE"
        assert retry_of(caught.value) > 0
        assert time.monotonic() - began < 2
        await restart(card)
        operation = sign_operation()
        answer = await until_back(stub, session, operation)
        check_signature(grid, "vm-1", operation.sign.digest, grid.open("hv-a", answer.containers[0]).results[0].output)


async def test_a_card_that_hangs_in_an_operation(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    process = grid.cards["se-vm-1"].process
    assert process is not None
    operation = sign_operation()
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        process.send_signal(signal.SIGSTOP)
        try:
            # The caller's deadline is shorter than the card's.
            began = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Execute(execute(operation), timeout=0.4, metadata=under(session))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - began < 0.8
            # And longer.
            assert await refused(stub.Execute(execute(sign_operation()), timeout=8, metadata=under(session))) == (
                grpc.StatusCode.UNAVAILABLE,
                "CARD_UNAVAILABLE",
            )
            assert time.monotonic() - began < 4
        finally:
            process.send_signal(signal.SIGCONT)
        answer = await until_back(stub, session, operation)
        assert len(answer.containers) == 1


async def test_a_full_queue_says_so(grid: TestGrid) -> None:
    async with grid.running(slot_queue=2, operation_timeout=30.0, watchdog_interval=600.0) as service:
        session = await grid.session("vm-1", "hv-a")
        process = grid.cards["se-vm-1"].process
        assert process is not None
        async with grid.channel("hv-a") as channel:
            stub = grid.stub(channel)
            await _call(stub, session, timeout=60)  # the card is in service before it hangs
            process.send_signal(signal.SIGSTOP)
            try:
                # Two are in the card, or on their way to it.
                waiting = [asyncio.create_task(_call(stub, session, timeout=60)) for _ in range(4)]
                bank = service.rack.vm("se-vm-1")
                assert bank is not None
                for _ in range(2000):
                    await asyncio.sleep(0.01)
                    if len(bank.queue) == 2:
                        break
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Execute(execute(sign_operation()), timeout=60, metadata=under(session))
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert reason_of(caught.value) == "SLOT_BUSY"
                assert retry_of(caught.value) > 0
            finally:
                process.send_signal(signal.SIGCONT)
            for answer in await asyncio.gather(*waiting):
                assert len(answer.containers) == 1


async def _call(stub: Any, session: dict[str, Any], timeout: float = 8) -> Any:
    return await stub.Execute(execute(sign_operation()), timeout=timeout, metadata=under(session))


async def test_another_vms_card_is_not_touched(grid: TestGrid) -> None:
    """Fairness is by card: while one VM's card hangs, another VM is served as ever."""
    async with grid.running():
        grid.hypervisor("hv-c")
        hanging = await grid.session("vm-1", "hv-a")
        other = await grid.session("vm-2", "hv-c")
        process = grid.cards["se-vm-1"].process
        assert process is not None
        async with grid.channel("hv-a") as channel, grid.channel("hv-c") as second:
            process.send_signal(signal.SIGSTOP)
            try:
                late = asyncio.create_task(_call(grid.stub(channel), hanging))
                for _ in range(20):
                    began = time.monotonic()
                    assert (await _call(grid.stub(second), other)).containers
                    assert time.monotonic() - began < 1
                assert not late.done()
            finally:
                process.send_signal(signal.SIGCONT)
            assert (await late).containers


async def test_a_restart_keeps_sessions_and_answers(grid: TestGrid, short_folder: Path) -> None:
    async with grid.running():
        session = await grid.session("vm-1", "hv-a")
        operation = sign_operation()
        async with grid.channel("hv-a") as channel:
            first = await grid.stub(channel).Execute(execute(operation), timeout=5, metadata=under(session))
    state = b"".join(path.read_bytes() for path in (short_folder / "state").glob("*.sqlite*"))
    assert session["session"].encode() not in state
    async with grid.running() as service, grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        again = await stub.Execute(execute(operation), timeout=5, metadata=under(session))
        assert list(again.containers) == list(first.containers)
        assert sum(slot.jobs_done for slot in service.rack.slots()) == 0
        new = await stub.Execute(execute(sign_operation()), timeout=5, metadata=under(session))
        assert len(new.containers) == 1


async def test_a_shutdown_with_an_open_stream_is_quick(grid: TestGrid) -> None:
    async with grid.channel("hv-a") as channel:
        async with grid.running():
            session = await grid.session("vm-1", "hv-a")
            stream = grid.stub(channel).ExecuteStream(metadata=under(session))
            assert (await exchange(stream, sign_operation())).containers
            began = time.monotonic()
        assert time.monotonic() - began < 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_the_end(stream)
        assert reason_of(caught.value) == "SHUTTING_DOWN"


async def test_metrics(grid: TestGrid) -> None:
    (port,) = free_ports(1)
    async with grid.running(metrics_port=port):
        session = await grid.session("vm-1", "hv-a")
        async with grid.channel("hv-a") as channel:
            stub = grid.stub(channel)
            await stub.Execute(execute(sign_operation(), sign_operation()), timeout=5, metadata=under(session))
            await refused(stub.Execute(execute(), timeout=5, metadata=under(session)))
        async with grid.browser(None) as browser:
            lines = (await browser.get(f"http://127.0.0.1:{port}/metrics")).body.decode().splitlines()
    assert 'gose_operations_total{operation="sign",outcome="OK"} 2.0' in lines
    assert 'gose_refusals_total{reason="OPERATION_INVALID"} 1.0' in lines
    assert 'gose_card_in_service{seid="se-vm-1"} 1.0' in lines
    assert 'gose_logins_total{outcome="OK"} 1.0' in lines
    assert "gose_sessions_granted_total 1.0" in lines
    assert 'gose_queue_length{queue="se-vm-1"} 0.0' in lines


async def test_a_session_ends_with_its_token(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a", valid=2)
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        stream = stub.ExecuteStream(metadata=under(session))
        assert (await exchange(stream, sign_operation())).containers
        await asyncio.sleep(max(0.0, session["expires_at"] - time.time()) + 0.05)
        ended = (grpc.StatusCode.UNAUTHENTICATED, "SESSION_EXPIRED")
        assert await refused(exchange(stream, sign_operation(), batch_id=2)) == ended
        code, _ = await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(session)))
        assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_streams_are_bounded(grid: TestGrid) -> None:
    async with grid.running(streams_per_hypervisor=2):
        session = await grid.session("vm-1", "hv-a")
        async with grid.channel("hv-a") as channel:
            stub = grid.stub(channel)
            streams = [stub.ExecuteStream(metadata=under(session)) for _ in range(2)]
            for stream in streams:
                assert (await exchange(stream, sign_operation())).containers
            too_many = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
            assert await refused_stream(stub, under(session), sign_operation()) == too_many
            await streams[0].done_writing()
            await read_to_the_end(streams[0])
            assert (await exchange(stub.ExecuteStream(metadata=under(session)), sign_operation())).containers


async def test_a_card_killed_in_the_middle_of_a_batch(grid: TestGrid, service: GridService) -> None:
    """What was done is answered, the rest fails clearly; the retry gets what was done again, and the rest is done."""
    session = await grid.session("vm-1", "hv-a")
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        for milliseconds in (15, 8, 25, 4, 40, 12, 2, 60):
            operations = [sign_operation() for _ in range(64)]
            call = stub.ExecuteStream(metadata=under(session))
            waiting = asyncio.create_task(exchange(call, *operations))
            await asyncio.sleep(milliseconds / 1000)
            await grid.cards["se-vm-1"].kill()
            answer = await waiting
            await restart(grid.cards["se-vm-1"])
            call.cancel()
            await until_back(stub, session, sign_operation())
            if answer.containers and answer.failures:
                break
        else:
            pytest.fail("the card was never killed in the middle")
        assert {failure.reason for failure in answer.failures} == {"CARD_UNAVAILABLE"}
        done = {result.request_id for result in grid.open("hv-a", answer.containers[0]).results}
        failed = {failure.request_id for failure in answer.failures}
        assert done | failed == {operation.request_id for operation in operations}
        assert not done & failed
        again = await stub.Execute(execute(*operations), timeout=10, metadata=under(session))
        assert not again.failures
        assert answer.containers[0] in again.containers
        (rest,) = set(again.containers) - set(answer.containers)
        assert {result.request_id for result in grid.open("hv-a", rest).results} == failed
