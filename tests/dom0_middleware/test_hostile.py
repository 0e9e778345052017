"""A guest with a valid certificate that means harm, and a grid that is broken: neither reaches another guest, or more than its share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from dom0_middleware.api.servers import MAX_CONNECTIONS
from dom0_middleware.channels.relay import MAX_CONNECTIONS as CARRIED
from dom0_middleware.guest import MAX_STREAMS
from dom0_middleware.operations import MAX_BATCH
from dom0_middleware.sessions import REFUSAL_STANDS
from secfunet.container import ContainerError
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from tests.dom0_middleware.test_lifecycle import refusal
from tests.dom0_middleware.test_operations import batch, operate
from tests.dom0_middleware.world import (
    TIMEOUT,
    Answer,
    Guest,
    SessionDouble,
    World,
    facts,
    output_of,
    request_for,
    require_signature,
    sign_operation,
    token,
)


async def signs(guest: Guest, vm: str) -> None:
    """This guest is served as ever."""
    operation = sign_operation()
    async with guest.agent() as stub:
        request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
        answer = await stub.Sign(request, timeout=TIMEOUT)
    require_signature(output_of(answer.results, operation, vm), operation, vm)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_connections_of_one_guest_do_not_use_up_the_descriptors(world: World) -> None:
    flood, honest = await world.enrolled("web"), await world.enrolled("db")
    before = descriptors()
    with contextlib.ExitStack() as stack:
        for address in (flood.join["agent"], flood.join["enrol"]):
            for number in range(4 * MAX_CONNECTIONS):
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                silent.setblocking(False)
                with contextlib.suppress(BlockingIOError):  # nobody takes it now
                    silent.connect(address.removeprefix("unix:"))
                if number % 32 == 0:
                    await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        ours = 8 * MAX_CONNECTIONS  # the other ends are in this process, too
        assert descriptors() - before - ours <= 2 * MAX_CONNECTIONS + 2 * CARRIED + 10
        await signs(honest, "db")


@pytest.mark.parametrize("how", ["cancelled", "of no method"])
async def test_calls_for_nothing_end_the_channel(world: World, how: str) -> None:
    """Neither is answered late, so each costs dom0 its time: beyond a bound the guest's connections end, and none is taken for a while."""
    flood, honest = await world.enrolled("web"), await world.enrolled("db")
    ended = [record for record in world.audit() if record["action"] == "channel.ended"]
    assert not ended
    unsound = operation_pb2.SignOperation(scheme=sign_operation().sign.scheme, digest=b"short")
    async with flood.agent_channel() as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        nothing = channel.unary_unary("/secfunet.middleware.v1.AgentService/Nothing", lambda request: request, bytes)
        for _ in range(100):
            if how == "cancelled":
                calls = [
                    stub.Sign(agent_pb2.SignRequest(request_id=os.urandom(16), sign=unsound), timeout=TIMEOUT)
                    for _ in range(32)
                ]
                await asyncio.sleep(0.05)
                for call in calls:
                    call.cancel()
            else:
                calls = [nothing(b"", timeout=TIMEOUT) for _ in range(32)]
            await asyncio.gather(*calls, return_exceptions=True)
            ended = [record for record in world.audit() if record["action"] == "channel.ended"]
            if ended:
                break
        assert [(record["vm"], record["reason"]) for record in ended] == [(flood.uuid, "CHANNEL_FLOODED")]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=1)
    await signs(honest, "db")


async def test_a_guest_holds_few_streams(world: World) -> None:
    """Each stream may hold answers that nobody reads."""
    flood, honest = await world.enrolled("web"), await world.enrolled("db")
    async with flood.agent() as stub:
        held = []
        for _ in range(MAX_STREAMS):
            call = stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
            await call.read()
            held.append(call)
        for more in (stub.WatchIdentity(agent_pb2.WatchIdentityRequest()), stub.Operate()):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await more.read()
            assert facts(error.value)[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        await signs(honest, "db")
        held.pop().cancel()
        await asyncio.sleep(0.2)
        again = stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
        await again.read()


async def test_what_a_guest_sends_is_not_sent_back_to_fill_memory(world: World) -> None:
    guest = await world.enrolled()
    huge = [operation_pb2.Operation(request_id=bytes([n]) * 1000) for n in range(60)]
    answers = await operate(guest, batch(1, huge))
    assert [len(failure.request_id) for failure in answers[1].failures] == [16] * 60
    assert answers[1].ByteSize() < 20_000
    late = agent_pb2.OperateRequest(batch_id=2, operations=huge)
    answers = await operate(guest, late)
    assert answers[2].ByteSize() < 20_000


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_small_message_does_not_unfold_into_a_large_one(world: World, how: grpc.Compression) -> None:
    guest = await world.boot(await world.create())
    async with guest.enrol_channel() as channel:
        bomb = agent_pb2.EnrolRequest(join_secret=guest.secret, certificate_signing_request=bytes(20_000_000))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent_pb2_grpc.EnrolmentServiceStub(channel).Enrol(bomb, timeout=TIMEOUT, compression=how)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await guest.enrol()


async def test_bytes_that_are_no_message_harm_nobody(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent_channel() as channel:
        raw = channel.unary_unary("/secfunet.middleware.v1.AgentService/Sign")
        for untrusted in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x7f", b"\x1a" * 5000, os.urandom(10_000)):
            with pytest.raises(grpc.aio.AioRpcError):
                await raw(untrusted, timeout=TIMEOUT)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary("/secfunet.middleware.v1.OrchestratorService/ListVms")(b"", timeout=TIMEOUT)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await signs(guest, "web")


async def test_a_neighbours_request_id_is_worth_nothing(world: World) -> None:
    """Two VMs, the same request id and the same digest: each gets its own answer, and the other's does not pass for it."""
    web, db = await world.enrolled("web"), await world.enrolled("db")
    operation = sign_operation()
    (of_web,) = (await operate(web, batch(1, [operation])))[1].results
    (of_db,) = (await operate(db, batch(1, [operation])))[1].results
    require_signature(output_of(of_web, operation, "web"), operation, "web")
    require_signature(output_of(of_db, operation, "db"), operation, "db")
    with pytest.raises(ContainerError):
        output_of(of_web, operation, "db")


async def test_deadlines_of_nothing_leave_nothing_behind(world: World) -> None:
    guest, honest = await world.enrolled("web"), await world.enrolled("db")
    world.grid.gate.clear()
    async with guest.agent() as stub:
        operation = sign_operation()
        request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
        hurried = [stub.Sign(request, timeout=0.01 + n / 1000) for n in range(100)]
        outcomes = await asyncio.gather(*(_code(call) for call in hurried))
    # UNAVAILABLE: a stream that was given up keeps its place until dom0 has done with it.
    of_time = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    assert set(outcomes) <= of_time
    await asyncio.sleep(0.2)
    (of_guest,) = [g for g in world.service.vms.guests() if g.uuid == guest.uuid]
    assert of_guest.operations_in_flight == 0
    world.grid.gate.set()
    await signs(honest, "db")
    await signs(guest, "web")


async def _code(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await call
    return await call.code()


async def test_a_guest_whose_token_is_refused_does_not_keep_the_card_busy(world: World) -> None:
    guest = await world.enrolled(vm_auth_token=token("web", hypervisor="elsewhere"))
    honest = await world.enrolled("db")
    await asyncio.sleep(REFUSAL_STANDS)
    before = world.grid.logins
    begun = asyncio.get_running_loop().time()
    answers = await operate(guest, *(batch(n, [sign_operation()]) for n in range(200)))
    took = asyncio.get_running_loop().time() - begun
    assert {failure.reason for answer in answers.values() for failure in answer.failures} == {"TOKEN_REFUSED"}
    assert world.grid.logins - before <= 2 + took / REFUSAL_STANDS
    await signs(honest, "db")


async def test_racing_enrolments_renewals_and_destruction(world: World) -> None:
    """Whoever wins: after the end no certificate of that run serves, and the next run starts clean."""
    hypervisor = world.hold_hypervisor()
    uuid = await world.create()
    for pause in range(5):
        guest = await world.boot(uuid)
        await guest.enrol()

        async def renew(guest: Guest = guest) -> None:
            async with guest.agent() as stub:
                for _ in range(10):
                    answer = await stub.RenewCertificate(
                        agent_pb2.RenewCertificateRequest(certificate_signing_request=request_for(guest.key)),
                        timeout=TIMEOUT,
                    )
                    guest.certificate = answer.certificate

        racing = asyncio.gather(renew(), renew(), return_exceptions=True)
        await asyncio.sleep(0.01 * pause)
        hypervisor.lookupByUUIDString(guest.uuid).destroy()
        await racing
        await _gone(world, guest)
        assert world.service._store.run(guest.uuid) is None
        assert not guest.folder.exists()


async def _gone(world: World, guest: Guest) -> None:
    for _ in range(500):
        if guest.uuid not in [g.uuid for g in world.service.vms.guests()] and not guest.folder.exists():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the run did not end")


# A grid that is broken.


@contextlib.asynccontextmanager
async def answering(guest: Guest, world: World, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> AsyncIterator[None]:
    async def broken(*_: object, **__: object) -> Answer:
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(SessionDouble, "execute", broken)
        yield


async def test_more_containers_than_operations_do_not_reach_the_card(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await world.enrolled()
    asked = []

    async def content_key(container: bytes, *, timeout: float) -> bytes:
        asked.append(container)
        return bytes(32)

    monkeypatch.setattr(world.grid, "content_key", content_key)
    async with answering(guest, world, monkeypatch, Answer((b"x" * 600,) * 10_000, ())):
        answers = await operate(guest, batch(1, [sign_operation(), sign_operation()]))
    assert {failure.reason for failure in answers[1].failures} == {"GRID_UNAVAILABLE"}
    assert asked == []


async def test_failures_for_what_was_not_asked_are_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = await world.enrolled()
    stray = tuple(operation_pb2.OperationFailure(request_id=os.urandom(16), code=99, reason="R") for _ in range(1000))
    async with answering(guest, world, monkeypatch, Answer((), stray)):
        answers = await operate(guest, batch(1, [sign_operation()]))
    assert len(answers[1].failures) <= MAX_BATCH
    assert not answers[1].results
    await signs(guest, "web")


async def test_a_grid_that_never_answers_costs_the_caller_its_time_only(world: World) -> None:
    guest, honest = await world.enrolled("web"), await world.enrolled("db")
    await signs(guest, "web")
    world.grid.gate.clear()
    operation = sign_operation()
    async with guest.agent() as stub:
        request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
        assert await _code(stub.Sign(request, timeout=0.5)) is grpc.StatusCode.DEADLINE_EXCEEDED
    world.grid.gate.set()
    await signs(honest, "db")
    await signs(guest, "web")


async def test_a_revoked_guest_signs_nothing(world: World) -> None:
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        await stub.RevokeVm(pb.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
    async with guest.agent() as stub:
        operation = sign_operation()
        request = agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)
        assert await refusal(stub.Sign(request, timeout=TIMEOUT)) == (grpc.StatusCode.PERMISSION_DENIED, "VM_REVOKED")
