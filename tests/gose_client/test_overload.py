"""A grid that has too much to do says when to come again: the client does, not earlier, and not all callers at the same moment."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from gose.slots.connect import ReadyCard
from gose_client import GridRefusedError
from gose_client.deadline import Deadline
from gose_client.errors import DeadlineError
from tests.gose.grid import sign_operation
from tests.gose_client.conftest import Host
from tests.gose_client.test_healing import sign

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


def busy(retry_after: float | None, reason: str = "SLOT_BUSY") -> GridRefusedError:
    return GridRefusedError(reason, "busy", code=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=retry_after)


async def test_pauses_are_as_long_as_advised_and_not_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    for _ in range(200):
        await Deadline(60).pause_or_refuse(busy(2.0))
    assert min(pauses) >= 2.0, "never before the grid said"
    assert max(pauses) <= 3.0
    assert len({round(pause, 2) for pause in pauses}) > 20, "spread over half as much again"


async def test_without_time_for_it_the_refusal_is_the_answer() -> None:
    with pytest.raises(GridRefusedError) as caught:
        await Deadline(1).pause_or_refuse(busy(2.0))
    assert caught.value.retry_after == 2.0
    with pytest.raises(DeadlineError):
        await Deadline(1).pause_or_refuse(busy(2.0, reason="SHUTTING_DOWN"))


async def test_more_callers_than_a_queue_has_places_are_all_served(host: Host) -> None:
    async with host.grid.running(slot_queue=2) as service, host.client() as client:
        session = await host.session(client)
        await asyncio.gather(*(sign(host, client, session, timeout=60) for _ in range(60)))
        (bank,) = [bank for bank in service.rack.banks() if bank.name == "se-vm-1"]
        assert bank.queue.refused > 0, "and some of them had to come again"


async def test_a_caller_without_patience_is_told_when_to_come_again(host: Host) -> None:
    async with host.grid.running(slot_queue=1) as service, host.client() as client:
        session = await host.session(client)
        await sign(host, client, session)
        (bank,) = [bank for bank in service.rack.banks() if bank.name == "se-vm-1"]
        gate = asyncio.Event()

        async def occupy(card: ReadyCard) -> None:
            await gate.wait()

        occupied = [bank.submit(occupy, deadline=time.monotonic() + 60)]
        await asyncio.sleep(0.05)
        occupied.append(bank.submit(occupy, deadline=time.monotonic() + 60))
        answer = await session.execute([sign_operation()], timeout=0.5)
        (failure,) = answer.failures
        assert (failure.reason, failure.code) == ("SLOT_BUSY", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert failure.retry_after_ms > 0
        patient = asyncio.create_task(sign(host, client, session))
        await asyncio.sleep(0.2)
        assert not patient.done()
        gate.set()
        await asyncio.gather(*occupied)
        await patient


async def test_too_many_calls_are_asked_again_too(host: Host) -> None:
    async with host.grid.running(calls_per_hypervisor=1) as service, host.client() as client:
        first = await host.session(client)
        await sign(host, client, first)  # its stream takes the only place
        second = await host.session(client)
        waiting = asyncio.create_task(sign(host, client, second))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert service.metrics.refusals.labels("TOO_MANY_CALLS")._value.get() >= 1
        await first.close()
        await waiting
