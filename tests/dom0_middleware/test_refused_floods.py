"""A guest that has itself refused in a loop, or begins requests that it does not end: what it costs others, and itself."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time

import grpc
import grpc.aio
import pytest

from dom0_middleware.api import guard
from dom0_middleware.api.servers import MAX_CONNECTIONS
from dom0_middleware.refusals import RefusalPace
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc, orchestrator_pb2
from tests.dom0_middleware.costly_requests import request_with_exponent
from tests.dom0_middleware.raw_http2 import RawConnection, unfinished
from tests.dom0_middleware.test_hostile import signs
from tests.dom0_middleware.test_operations import batch, operate
from tests.dom0_middleware.world import TIMEOUT, Guest, World, request_for, sign_operation

SIGN = "/secfunet.middleware.v1.AgentService/Sign"


async def time_of_signatures(guest: Guest, vm: str, seconds: float) -> float:
    took = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        await signs(guest, vm)
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


@pytest.mark.parametrize("request_der", [request_with_exponent(3072, 3071), b"", request_with_exponent(4096, 17)])
async def test_a_flood_of_requests_to_enrol_is_answered_late(world: World, request_der: bytes) -> None:
    flood, honest = await world.boot(await world.create("web")), await world.enrolled("db")
    quiet = await time_of_signatures(honest, "db", 1.0)
    answered, stop = 0, False

    async def enrols(secret: bytes) -> None:
        nonlocal answered
        async with flood.enrol_channel() as channel:
            stub = agent_pb2_grpc.EnrolmentServiceStub(channel)
            request = agent_pb2.EnrolRequest(join_secret=secret, certificate_signing_request=request_der)
            while not stop:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Enrol(request, timeout=30)
                if error.value.code() is grpc.StatusCode.UNAVAILABLE:  # no place for another connection
                    await asyncio.sleep(0.1)
                else:
                    answered += 1

    floods = [asyncio.create_task(enrols(flood.secret if number % 2 else b"x" * 32)) for number in range(8)]
    await asyncio.sleep(1.0)
    before = answered
    loud = await time_of_signatures(honest, "db", 2.0)
    in_between = answered - before
    async with world.orchestrator() as stub:
        begin = time.monotonic()
        await stub.StopVm(orchestrator_pb2.StopVmRequest(uuid=flood.uuid, force=True), timeout=TIMEOUT)
        assert time.monotonic() - begin < 5
    stop = True
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    assert in_between < 40 * 3, "some twenty a second, however many ask"
    assert loud < 4 * quiet + 0.05


async def test_refused_operations_are_answered_late(world: World) -> None:
    world.policy.write_text('[[rule]]\nnames = ["db"]\noperations = ["sign"]\nschemes = ["*"]\n')
    world.service.policy.reload()
    guest = await world.enrolled("web")
    (of_guest,) = world.service.vms.guests()
    of_guest.refused_operations = RefusalPace(time.monotonic, burst=64, per_second=100)
    begin = time.monotonic()
    answers = await operate(guest, *(batch(number, [sign_operation() for _ in range(50)]) for number in range(4)))
    assert sum(len(answer.failures) for answer in answers.values()) == 200
    assert time.monotonic() - begin > 1.0


def test_the_pace_of_refusals() -> None:
    now = 1000.0
    pace = RefusalPace(lambda: now, burst=10, per_second=2)
    assert [pace.delay() for _ in range(10)] == [0.0] * 10
    assert [pace.delay() for _ in range(3)] == [0.5, 1.0, 1.5]
    now += 3600
    assert [pace.delay() for _ in range(10)] == [0.0] * 10
    assert pace.delay(4) == 2.0


@pytest.mark.parametrize("path", [SIGN, "/secfunet.middleware.v1.AgentService/WatchIdentity"])
async def test_a_request_that_does_not_come_to_its_end_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(guard, "RECEIVE_TIMEOUT", 1.0)
    guest = await world.enrolled()

    def holds() -> tuple[float, bool]:
        with RawConnection(guest) as connection:
            connection.begin(1, path, unfinished(60_000))
            begin = time.monotonic()
            while 1 not in connection.ended and not connection.closed and time.monotonic() < begin + 10:
                connection.listen()
            return time.monotonic() - begin, 1 in connection.ended

    took, ended = await asyncio.to_thread(holds)
    assert ended
    assert 0.5 < took < 8
    assert [r["reason"] for r in world.audit() if r["action"] == "call"] == ["REQUEST_INVALID"]
    await signs(guest, "web")


async def test_a_request_has_a_size(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.RenewCertificate(
                agent_pb2.RenewCertificateRequest(certificate_signing_request=bytes(20_000)), timeout=TIMEOUT
            )
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.RenewCertificate(
                agent_pb2.RenewCertificateRequest(certificate_signing_request=bytes(100_000)), timeout=TIMEOUT
            )
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await stub.RenewCertificate(
            agent_pb2.RenewCertificateRequest(certificate_signing_request=request_for(guest.key)), timeout=TIMEOUT
        )


async def test_unfinished_requests_on_all_connections_leave_the_neighbour_alone(world: World) -> None:
    flood, honest = await world.enrolled("web"), await world.enrolled("db")
    quiet = await time_of_signatures(honest, "db", 1.0)
    stop = threading.Event()
    begun = [0] * MAX_CONNECTIONS

    def holds(number: int) -> None:
        try:
            with RawConnection(flood) as connection:
                for stream in range(1, 2 * 64, 2):
                    connection.begin(stream, SIGN, unfinished(60_000)[:1000])
                    begun[number] += 1
                while not stop.is_set() and not connection.closed:
                    connection.listen()
        except OSError:
            return

    threads = [threading.Thread(target=holds, args=(number,)) for number in range(MAX_CONNECTIONS)]
    for thread in threads:
        thread.start()
    try:
        await asyncio.sleep(0.5)
        assert sum(begun) > 0
        assert await time_of_signatures(honest, "db", 1.5) < 4 * quiet + 0.05
        async with world.orchestrator() as stub:
            await stub.RevokeVm(orchestrator_pb2.RevokeVmRequest(uuid=flood.uuid), timeout=TIMEOUT)
            await stub.StopVm(orchestrator_pb2.StopVmRequest(uuid=flood.uuid, force=True), timeout=TIMEOUT)
    finally:
        stop.set()
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
