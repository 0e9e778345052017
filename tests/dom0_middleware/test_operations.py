"""Operations: sanitise, permit, act; unary and in streams; each decision on record."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from dom0_middleware.api.agent import BATCHES_IN_FLIGHT
from dom0_middleware.api.errors import facts_of
from dom0_middleware.call import Call
from dom0_middleware.guest_authority import agent_certificate
from dom0_middleware.hypervisor import DomainState
from dom0_middleware.operations import Operations
from gose_client.errors import GridUnavailableError
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import pem_of
from secfunet.middleware.v1 import agent_pb2
from tests.dom0_middleware.world import (
    TIMEOUT,
    Guest,
    World,
    eventually,
    facts,
    output_of,
    require_signature,
    sign_operation,
    token,
)

OAEP = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256
PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256


async def sign_refused(guest: Guest, operation: operation_pb2.Operation) -> tuple[grpc.StatusCode, str, float | None]:
    async with guest.agent() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(
                agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT
            )
    return facts(error.value)


async def operate(guest: Guest, *batches: agent_pb2.OperateRequest) -> dict[int, agent_pb2.OperateResponse]:
    async def requests() -> AsyncIterator[agent_pb2.OperateRequest]:
        for batch in batches:
            yield batch

    async with guest.agent() as stub:
        return {response.batch_id: response async for response in stub.Operate(requests(), timeout=TIMEOUT)}


def batch(
    number: int, operations: Sequence[operation_pb2.Operation], timeout_ms: int = 5000
) -> agent_pb2.OperateRequest:
    return agent_pb2.OperateRequest(batch_id=number, operations=operations, timeout_ms=timeout_ms)


def decisions(world: World) -> list[tuple[str, str]]:
    return [(str(r["decision"]), str(r.get("reason", ""))) for r in world.audit() if r["action"] == "operation"]


def write_policy(world: World, text: str) -> None:
    world.policy.write_text(text)
    world.service.reload()


async def test_batches_are_answered_and_each_decision_is_on_record(world: World) -> None:
    guest = await world.enrolled()
    operations = [[sign_operation() for _ in range(size)] for size in (1, 64, 5)]
    answers = await operate(guest, *(batch(number, ops) for number, ops in enumerate(operations)))
    assert set(answers) == {0, 1, 2}
    for number, ops in enumerate(operations):
        (sealed,) = answers[number].results
        assert not answers[number].failures
        for operation in ops:
            require_signature(output_of(sealed, operation, "web"), operation, "web")
    assert world.grid.logins == 1
    records = [r for r in world.audit() if r["action"] == "operation"]
    assert len(records) == 70
    assert {r["request"] for r in records} == {op.request_id.hex() for ops in operations for op in ops}
    assert {r["batch"] for r in records} == {0, 1, 2}
    assert len({r["correlation"] for r in records}) == 70
    assert {r["digest"] for r in records} == {op.sign.digest.hex() for ops in operations for op in ops}
    assert all(r["scheme"] == "rsassa-pss-sha256" and r["operation"] == "sign" for r in records)


async def test_nothing_of_what_is_computed_is_in_the_log(world: World) -> None:
    guest = await world.enrolled()
    plaintext = b"a plaintext that nobody may read"
    operation = sign_operation()
    async with guest.agent() as stub:
        response = await stub.Sign(
            agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT
        )
        encrypt = operation_pb2.EncryptOperation(scheme=OAEP, plaintext=plaintext)
        await stub.Encrypt(
            agent_pb2.EncryptRequest(request_id=secrets.token_bytes(16), encrypt=encrypt), timeout=TIMEOUT
        )
    world.service.audit.flush()
    log = (world.state / "audit.jsonl").read_bytes()
    forms = [plaintext, response.results.content_key, guest.secret]
    for secret in [*forms, *(form.hex().encode() for form in forms), token("web").split(".")[2].encode()]:
        assert secret not in log


async def test_the_record_is_there_before_the_grid_is_asked(world: World) -> None:
    guest = await world.enrolled()
    world.grid.gate.clear()
    operation = sign_operation()
    async with guest.agent() as stub:
        call = stub.Sign(agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT)
        task = asyncio.ensure_future(call)
        await eventually(lambda: world.grid.executed)
        # Read as another process would: nothing is flushed for it.
        assert operation.request_id.hex() in (world.state / "audit.jsonl").read_text()
        world.grid.gate.set()
        await task


async def test_a_log_that_cannot_be_written_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from secfunet.service import audit

    guest = await world.enrolled()

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "write", full)
        code, reason, wait = await sign_refused(guest, sign_operation())
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "AUDIT_UNAVAILABLE")
    assert wait is not None
    assert world.grid.executed == []


@pytest.mark.parametrize(
    "operation",
    [
        operation_pb2.Operation(request_id=b"short", sign=operation_pb2.SignOperation(scheme=PSS, digest=b"d" * 32)),
        operation_pb2.Operation(request_id=b"i" * 16, sign=operation_pb2.SignOperation(scheme=PSS, digest=b"d" * 31)),
        operation_pb2.Operation(request_id=b"i" * 16, sign=operation_pb2.SignOperation(scheme=0, digest=b"d" * 32)),
        operation_pb2.Operation(request_id=b"i" * 16, sign=operation_pb2.SignOperation(scheme=99, digest=b"d" * 32)),
    ],
)
async def test_what_is_no_operation_is_refused(world: World, operation: operation_pb2.Operation) -> None:
    guest = await world.enrolled()
    assert (await sign_refused(guest, operation))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "OPERATION_INVALID")
    answers = await operate(guest, batch(1, [operation, sign_operation()]))
    assert [failure.reason for failure in answers[1].failures] == ["OPERATION_INVALID"]
    assert len(answers[1].results) == 1
    assert decisions(world) == [("refused", "OPERATION_INVALID")] * 2 + [("permitted", "")]


async def test_one_request_id_stands_once_in_a_batch(world: World) -> None:
    guest = await world.enrolled()
    first, second = sign_operation(), sign_operation()
    second.request_id = first.request_id
    answers = await operate(guest, batch(1, [first, second]))
    assert [failure.reason for failure in answers[1].failures] == ["OPERATION_INVALID"]
    assert world.grid.executed == [[first.request_id]]


@pytest.mark.parametrize("size", [0, 65])
async def test_a_batch_of_a_wrong_size_ends_the_stream(world: World, size: int) -> None:
    guest = await world.enrolled()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await operate(guest, batch(1, [sign_operation() for _ in range(size)]))
    assert facts(error.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


async def test_a_batch_needs_a_timeout(world: World) -> None:
    guest = await world.enrolled()
    answers = await operate(guest, batch(1, [sign_operation()], 0), batch(2, [sign_operation()], 2**32 - 1))
    assert [answers[n].failures[0].reason for n in (1, 2)] == ["DEADLINE_REQUIRED"] * 2
    assert world.grid.executed == []


async def test_a_batch_that_takes_too_long_fails_alone(world: World) -> None:
    guest = await world.enrolled()
    world.grid.gate.clear()
    answers = await operate(guest, batch(1, [sign_operation()], 50))
    assert answers[1].failures[0].reason == "DEADLINE_EXCEEDED"
    assert answers[1].failures[0].code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert decisions(world) == [("permitted", ""), ("failed", "DEADLINE_EXCEEDED")]
    assert world.grid.timeouts[0] <= 0.05


async def test_policy_decides(world: World) -> None:
    guest, other = await world.enrolled(), await world.enrolled("db")
    write_policy(world, '[[rule]]\nnames = ["web"]\noperations = ["encrypt"]\nschemes = ["*"]')
    assert (await sign_refused(guest, sign_operation()))[:2] == (grpc.StatusCode.PERMISSION_DENIED, "POLICY_DENIED")
    assert (await sign_refused(other, sign_operation()))[1] == "POLICY_DENIED"
    encrypt = operation_pb2.Operation(
        request_id=secrets.token_bytes(16), encrypt=operation_pb2.EncryptOperation(scheme=OAEP, plaintext=b"x")
    )
    answers = await operate(guest, batch(1, [encrypt, sign_operation()]))
    assert len(answers[1].results) == 1
    assert [failure.reason for failure in answers[1].failures] == ["POLICY_DENIED"]
    async with guest.agent() as stub:
        identity = (await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)).identity
    assert list(identity.operations) == ["encrypt"]


async def test_a_policy_that_changes_is_told_to_who_watches_the_identity(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as stub:
        stream = stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
        assert list((await stream.read()).identity.operations) == ["decrypt", "encrypt", "sign"]
        write_policy(world, '[[rule]]\nnames = ["web"]\noperations = ["sign"]\nschemes = ["*"]')
        assert list((await asyncio.wait_for(stream.read(), 3)).identity.operations) == ["sign"]
        stream.cancel()


async def test_who_watches_hears_of_the_grid_when_it_is_back(world: World) -> None:
    world.grid.down = GridUnavailableError("away")
    guest = await world.enrolled()
    async with guest.agent() as stub:
        stream = stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
        assert (await stream.read()).identity.container_authority == b""
        world.grid.down = None
        assert (await asyncio.wait_for(stream.read(), 5)).identity.container_authority != b""
        stream.cancel()


async def test_a_rate_is_refused_with_a_time_to_wait(world: World) -> None:
    guest = await world.enrolled()
    write_policy(
        world,
        '[[rule]]\nnames = ["web"]\noperations = ["sign"]\nschemes = ["*"]\nrate = { per_second = 0.5, burst = 2 }',
    )
    answers = await operate(guest, batch(1, [sign_operation() for _ in range(3)]))
    (failure,) = answers[1].failures
    assert failure.reason == "RATE_LIMITED"
    assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert 0 < failure.retry_after_ms <= 2000
    code, reason, wait = await sign_refused(guest, sign_operation())
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert wait is not None
    assert 0 < wait <= 2


async def test_the_token_decides_too(world: World) -> None:
    guest = await world.enrolled("web", vm_auth_token=token("web", operations=frozenset({"decrypt"})))
    code, reason, _ = await sign_refused(guest, sign_operation())
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "OPERATION_NOT_ALLOWED")
    assert world.grid.executed == []
    assert decisions(world) == [("refused", "OPERATION_NOT_ALLOWED")]


async def test_without_a_token_nothing_works(world: World) -> None:
    guest = await world.enrolled("web", vm_auth_token="")
    code, reason, _ = await sign_refused(guest, sign_operation())
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOKEN_MISSING")


async def test_a_token_for_another_hypervisor_is_the_grids_refusal(world: World) -> None:
    guest = await world.enrolled("web", vm_auth_token=token("web", hypervisor="another"))
    code, reason, _ = await sign_refused(guest, sign_operation())
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "TOKEN_REFUSED")
    assert decisions(world) == [("failed", "TOKEN_REFUSED")]


async def test_the_grids_failures_are_passed_on(world: World) -> None:
    guest = await world.enrolled()
    bad, good = sign_operation(), sign_operation()
    world.grid.fail_ids.add(bad.request_id)
    answers = await operate(guest, batch(7, [bad, good]))
    (failure,) = answers[7].failures
    assert (failure.request_id, failure.code, failure.reason, failure.retry_after_ms) == (
        bad.request_id,
        8,
        "SLOT_BUSY",
        250,
    )
    require_signature(output_of(answers[7].results[0], good, "web"), good, "web")
    code, reason, wait = await sign_refused(guest, bad)
    assert (code, reason, wait) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOT_BUSY", 0.25)


async def test_a_grid_that_is_away_is_unavailable(world: World) -> None:
    world.grid.down = GridUnavailableError("away", retry_after=2.0)
    guest = await world.enrolled()
    assert await sign_refused(guest, sign_operation()) == (grpc.StatusCode.UNAVAILABLE, "GRID_UNAVAILABLE", 2.0)
    world.grid.down = None
    await operate(guest, batch(1, [sign_operation()]))


async def test_a_stream_is_read_only_as_far_as_it_is_answered(world: World) -> None:
    guest = await world.enrolled()
    await operate(guest, batch(0, [sign_operation()]))
    world.grid.gate.clear()
    async with guest.agent() as stub:
        call = stub.Operate(timeout=TIMEOUT)

        async def write() -> None:
            for number in range(3 * BATCHES_IN_FLIGHT):
                await call.write(batch(number, [sign_operation()]))
            await call.done_writing()

        writer = asyncio.create_task(write())
        await eventually(lambda: len(world.grid.executed) == 1 + BATCHES_IN_FLIGHT)
        await asyncio.sleep(0.1)
        assert len(world.grid.executed) == 1 + BATCHES_IN_FLIGHT
        world.grid.gate.set()
        answered = [response.batch_id async for response in call]
        await writer
    assert sorted(answered) == list(range(3 * BATCHES_IN_FLIGHT))
    assert world.service.vms.guests()[0].operations_in_flight == 0


async def test_a_domain_has_a_share_of_operations_in_flight(world: World) -> None:
    world.extra = {"limits": {"operations_in_flight": 10}}
    await world.stop()
    await world.start()
    guest = await world.enrolled()
    world.grid.gate.clear()
    async with guest.agent() as stub:
        call = stub.Operate(timeout=TIMEOUT)
        await call.write(batch(1, [sign_operation() for _ in range(8)]))
        await eventually(lambda: world.grid.executed)
        await call.write(batch(2, [sign_operation() for _ in range(3)]))
        refused = await call.read()
        assert refused.batch_id == 2
        assert {failure.reason for failure in refused.failures} == {"TOO_MANY_OPERATIONS"}
        world.grid.gate.set()
        assert (await call.read()).batch_id == 1
        await call.done_writing()


async def test_a_stream_that_is_cancelled_leaves_nothing_behind(world: World) -> None:
    guest = await world.enrolled()
    world.grid.gate.clear()
    async with guest.agent() as stub:
        call = stub.Operate(timeout=TIMEOUT)
        await call.write(batch(1, [sign_operation()]))
        await eventually(lambda: world.grid.executed)
        call.cancel()
    (run,) = world.service.vms.guests()
    await eventually(lambda: run.operations_in_flight == 0)
    assert world.service.sessions._slots[guest.uuid].tasks == set()


async def test_a_stream_ends_when_its_certificate_does(world: World) -> None:
    world.extra = {"limits": {"agent_certificate_lifetime": 60}}
    await world.stop()
    await world.start()
    guest = await world.enrolled()
    async with guest.agent() as stub:
        call = stub.Operate(timeout=TIMEOUT)
        await call.write(batch(1, [sign_operation()]))
        assert len((await call.read()).results) == 1
        world.clock_offset = 61.0
        await call.write(batch(2, [sign_operation()]))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    assert facts(error.value)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_EXPIRED")
    assert ("call", "CERTIFICATE_EXPIRED") in [(r["action"], r.get("reason")) for r in world.audit()]


async def test_two_vms_at_once_get_each_their_own(world: World) -> None:
    web, db = await asyncio.gather(world.enrolled("web"), world.enrolled("db"))
    operations = {"web": [sign_operation() for _ in range(8)], "db": [sign_operation() for _ in range(8)]}
    answers = await asyncio.gather(operate(web, batch(1, operations["web"])), operate(db, batch(1, operations["db"])))
    for vm, answer in zip(("web", "db"), answers, strict=True):
        for operation in operations[vm]:
            require_signature(output_of(answer[1].results[0], operation, vm), operation, vm)
    assert world.grid.logins == 2


@pytest.mark.parametrize("what", ["stop", "revoke", "renewal", "paused"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
async def test_what_ends_while_the_login_is_made_is_not_done(world: World, what: str, turns: int) -> None:
    """The right ends in the very turn of the event loop in which the answer to the login comes, or in one of the next."""
    shown = await world.enrolled()
    service = world.service
    (guest,) = service.vms.guests()
    room = Operations(
        guest,
        policy=service.policy,
        sessions=service.sessions,
        audit=service.audit,
        metrics=service.metrics,
        limit=10,
        facts_of=facts_of,
    )
    call = Call("/test", "0" * 16, agent_certificate(pem_of(shown.certificate)))
    world.grid.login_gate.clear()
    operation = sign_operation()
    task = asyncio.create_task(room.perform(call, [operation], timeout=5))
    await eventually(lambda: world.grid.logins == 1)

    def ends() -> None:
        if what == "stop":
            guest.end()
            service.sessions.end(guest.uuid)
        elif what == "revoke":
            guest.record = replace(guest.record, revoked=True, vm_auth_token="")
            service.sessions.end(guest.uuid)
        elif what == "renewal":
            guest.make_current(replace(call.certificate, serial=7), b"")  # type: ignore[type-var, arg-type]
        else:
            guest.set_state(DomainState.PAUSED)

    world.grid.login_gate.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    executed_first, permitted_first = bool(world.grid.executed), ("permitted", "") in decisions(world)
    ends()
    outcome = await task
    if not permitted_first:
        assert ("permitted", "") not in decisions(world)
    if not executed_first and (what in ("stop", "revoke") or not permitted_first):
        assert not outcome.results
        assert world.grid.executed == []
    assert world.grid.logins == 1
    if what in ("stop", "revoke"):
        assert len(service.sessions) == 0
