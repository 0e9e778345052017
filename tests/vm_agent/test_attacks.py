"""Answers that are not what they should be, sent by a middleware that was taken over or confused: none gives a program an output."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import grpc
import grpc.aio
import pytest

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.container import ContainerSealer
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import thumbprint
from secfunet.middleware.v1 import agent_pb2
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import Grid, MiddlewareDouble, rsa_key
from tests.vm_agent.test_service import SIGN, reason_of, running
from vm_agent.options import AgentOptions

Attack = Callable[[Grid, list[operation_pb2.Operation]], list[agent_pb2.SealedResults]]


def forged_with_another_key(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    forger = Grid(vm=grid.vm, hypervisor=grid.hypervisor, authority=rsa_key())
    forger.vm_certificate, forger.hypervisor_certificate = grid.vm_certificate, grid.hypervisor_certificate
    return [forger.seal(forger.results(operations))]


def one_bit_changed(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    sealed = grid.seal(grid.results(operations))
    flipped = bytearray(sealed.container)
    flipped[300] ^= 1
    return [agent_pb2.SealedResults(container=bytes(flipped), content_key=sealed.content_key)]


def for_another_request(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    others = [operation_pb2.Operation(request_id=bytes(16), sign=operation.sign) for operation in operations]
    return [grid.seal(grid.results(others))]


def for_another_digest(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    others = [operation_pb2.Operation(request_id=o.request_id, sign=o.sign) for o in operations]
    for other in others:
        other.sign.digest = hashlib.sha256(b"something else").digest()
    return [grid.seal(grid.results(others))]


def for_another_vm(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    results = grid.results(operations)
    results.vmid = thumbprint(b"another VM")
    return [grid.seal(results)]


def for_another_hypervisor(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    results = grid.results(operations)
    results.hvid = thumbprint(b"another hypervisor")
    return [grid.seal(results)]


def from_an_hour_ago(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    results = grid.results(operations)
    results.time -= 3600
    return [grid.seal(results)]


def wrong_content_key(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    sealed = grid.seal(grid.results(operations))
    return [agent_pb2.SealedResults(container=sealed.container, content_key=bytes(32))]


def short_content_key(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    sealed = grid.seal(grid.results(operations))
    return [agent_pb2.SealedResults(container=sealed.container, content_key=sealed.content_key[:16])]


def no_protobuf_inside(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    sealer = ContainerSealer(grid.hypervisor.public_key(), grid.authority, randbytes=bytes)  # a content key of zeros
    return [agent_pb2.SealedResults(container=sealer.seal(b"\xff" * 99), content_key=bytes(32))]


def oversize(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    sealed = grid.seal(grid.results(operations))
    return [agent_pb2.SealedResults(container=sealed.container + bytes(1 << 19), content_key=sealed.content_key)]


def too_many_containers(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    return [agent_pb2.SealedResults(container=b"x" * 600)] * 100 + [grid.seal(grid.results(operations))]


def answered_twice_inside(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    results = grid.results(operations)
    results.results.append(results.results[0])
    return [grid.seal(results)]


def nothing(grid: Grid, operations: list[operation_pb2.Operation]) -> list[agent_pb2.SealedResults]:
    return []


ATTACKS: list[Attack] = [
    forged_with_another_key,
    one_bit_changed,
    for_another_request,
    for_another_digest,
    for_another_vm,
    for_another_hypervisor,
    from_an_hour_ago,
    wrong_content_key,
    short_content_key,
    no_protobuf_inside,
    oversize,
    too_many_containers,
    answered_twice_inside,
    nothing,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_refused_with_one_error(
    attack: Attack, middleware: MiddlewareDouble, options: AgentOptions, grid: Grid
) -> None:
    async def answer(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        results = attack(grid, list(request.operations))
        return [agent_pb2.OperateResponse(batch_id=request.batch_id, results=results)]

    honest, middleware.answer = middleware.answer, answer
    async with running(options) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(SIGN, timeout=5)
        assert error.value.code() is grpc.StatusCode.DATA_LOSS
        assert reason_of(error.value) == "ANSWER_REFUSED"
        # What is right in all but its time is told apart: it is a clock that a person can set.
        cause = "it was made 36" if attack is from_an_hour_ago else "its container is not what it should be (id "
        assert str(error.value.details()).startswith(f"the answer to this operation was refused: {cause}")
        middleware.answer = honest
        assert (await stub.Sign(SIGN, timeout=5)).signature  # and the agent goes on


async def test_a_replayed_container_answers_nothing(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    recorded: list[agent_pb2.OperateResponse] = []
    honest = middleware.answer

    async def record_then_replay(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        if not recorded:
            recorded.extend(await honest(request))
            return recorded
        return [agent_pb2.OperateResponse(batch_id=request.batch_id, results=recorded[0].results)]

    middleware.answer = record_then_replay
    async with running(options) as (_, stub):
        assert (await stub.Sign(SIGN, timeout=5)).signature
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(SIGN, timeout=5)  # the very same digest
    assert reason_of(error.value) == "ANSWER_REFUSED"


async def test_a_good_answer_beside_a_bad_one_serves_its_caller_only(
    middleware: MiddlewareDouble, options: AgentOptions, grid: Grid
) -> None:
    async def half(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        good = [operation for operation in request.operations if operation.sign.digest[0] % 2]
        bad = [operation for operation in request.operations if not operation.sign.digest[0] % 2]
        results = [grid.seal(grid.results(good))] if good else []
        results += one_bit_changed(grid, bad) if bad else []
        return [agent_pb2.OperateResponse(batch_id=request.batch_id, results=results)]

    middleware.answer = half
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)

        async def sign(first: int) -> bytes | str:
            request = local_pb2.SignRequest()
            request.CopyFrom(SIGN)
            request.sign.digest = bytes([first]) * 32
            try:
                return (await stub.Sign(request, timeout=5)).signature
            except grpc.aio.AioRpcError as error:
                return reason_of(error)

        outcomes = await asyncio.gather(*(sign(number) for number in range(20)))
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, bytes) if number % 2 else outcome == "ANSWER_REFUSED"


async def test_disorder_duplicates_and_strangers(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    honest = middleware.answer
    held: list[agent_pb2.OperateResponse] = []

    async def disorder(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        response = (await honest(request))[0]
        stranger = agent_pb2.OperateResponse(batch_id=request.batch_id + 1_000_000, results=response.results)
        if len(middleware.batches) == 1:
            held.append(response)
            return [stranger]
        return [stranger, response, response, *held]

    middleware.answer = disorder
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        first = stub.Sign(SIGN, timeout=5)
        await eventually(lambda: len(middleware.batches) == 1)
        second = stub.Sign(SIGN, timeout=5)
        assert (await second).signature
        assert (await first).signature


async def test_a_middleware_that_never_answers(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async def never(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        await asyncio.Event().wait()
        return []

    honest, middleware.answer = middleware.answer, never
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        calls = [stub.Sign(SIGN, timeout=0.3) for _ in range(5)]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        middleware.answer = honest
        assert (await stub.Sign(SIGN, timeout=5)).signature


async def test_another_domains_certificate_is_not_taken(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    """The middleware hands out a certificate for another domain: the agent does not enrol with it."""
    middleware.invite()
    middleware.uuid = "00000000-0000-4000-8000-000000000000"
    async with running(options) as (service, stub):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(SIGN, timeout=5)
        assert not service.status().enrolled
    assert reason_of(error.value) == "ENROLMENT_REFUSED"


async def test_local_programs_only_see_the_local_service(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options), grpc.aio.insecure_channel(f"unix:{options.socket}") as channel:
        call = channel.unary_unary("/secfunet.middleware.v1.AgentService/Sign")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(b"", timeout=5)
        big = local_pb2.SignRequest(sign=operation_pb2.SignOperation(digest=bytes(100_000)))
        with pytest.raises(grpc.aio.AioRpcError) as large:
            await local_pb2_grpc.LocalServiceStub(channel).Sign(big, timeout=5)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
