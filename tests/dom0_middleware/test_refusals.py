"""A guest cannot fill dom0's disk with its own refusals."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from dom0_middleware.guest import RENEWALS
from dom0_middleware.refusals import BURST, PER_SECOND, RefusalMeter
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from tests.dom0_middleware.test_operations import batch, operate
from tests.dom0_middleware.world import TIMEOUT, World, facts, request_for


def test_refusals_beyond_the_bound_are_counted_and_the_count_is_told() -> None:
    now = [0.0]
    meter = RefusalMeter(lambda: now[0])
    assert [meter.admit() for _ in range(int(BURST))] == [""] * int(BURST)
    assert [meter.admit() for _ in range(7)] == [None] * 7
    now[0] += 1 / PER_SECOND + 1e-9
    assert meter.admit() == "after 7 refusals that were only counted"
    assert meter.admit() is None
    now[0] += 1000
    assert meter.admit() == "after 1 refusals that were only counted"
    assert meter.admit() == ""


async def test_renewals_have_a_rate(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as stub:
        request = agent_pb2.RenewCertificateRequest(certificate_signing_request=request_for(guest.key))
        for _ in range(int(RENEWALS)):
            await stub.RenewCertificate(request, timeout=TIMEOUT)
            # Only the asking certificate and the newest are current: this one stays the asking one.
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.RenewCertificate(request, timeout=TIMEOUT)
    code, reason, wait = facts(error.value)
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert wait == pytest.approx(10)


async def test_a_flood_of_one_guest_is_bounded_and_does_not_touch_another(world: World) -> None:
    flood, honest = await world.enrolled("web"), await world.enrolled("db")
    unsound = [operation_pb2.Operation(request_id=bytes([n])) for n in range(64)]
    answers = await operate(flood, *(batch(n, unsound) for n in range(60)))
    assert sum(len(answer.failures) for answer in answers.values()) == 60 * 64
    await operate(honest, batch(1, [operation_pb2.Operation()]))
    records = [r for r in world.audit() if r["action"] == "operation"]
    of_flood = [r for r in records if r["vm"] == flood.uuid]
    assert BURST <= len(of_flood) < BURST + 600
    assert len([r for r in records if r["vm"] == honest.uuid]) == 1
