"""More than a grid can do: refused early and with a time to wait; what it accepted is right and in time; nothing grows beyond its bound."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256

from gose.server import GridService
from secfunet.gose.v1 import service_provider_pb2 as pb
from secfunet.identity import load_certificate
from tests.gose.grid import TestGrid, new_grid, sign_operation
from tests.gose.test_operations import reason_of, retry_of

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]

CARD_SECONDS = 0.05
PATIENCE = 3.0
FLOOD = 400


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow(short_folder: Path) -> AsyncIterator[TestGrid]:
    """A VM's card that takes its time, and a neighbour's."""
    latency = f"[benchmark_latency]\nprivate_key = {CARD_SECONDS}\nkey_pair = 0\ncommand = 0"
    async with new_grid(short_folder, vms=("vm-1", "vm-2"), servers=1, vm_cards=latency) as grid:
        grid.hypervisor("hv-a")
        yield grid


def sizes(service: GridService) -> dict[str, int]:
    """Everything in the grid that could pile up."""
    return {
        "queue": max(len(bank.queue) for bank in service.rack.banks()),
        "flights": service.executor.in_work,
        "calls": service.callers.calls,
        "sessions": len(service.sessions),
    }


async def flood(grid: TestGrid, service: GridService, *, calls: int) -> tuple[Counter[str], dict[str, int]]:
    """Many calls at once; outcomes by reason, and the largest sizes that were seen. Checks each answer and each refusal."""
    session = await grid.session("vm-1", "hv-a")
    public = load_certificate(grid.vms["vm-1"].certificate).public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    outcomes: Counter[str] = Counter()
    advised: list[float] = []
    largest: Counter[str] = Counter()

    async def watch() -> None:
        while True:
            largest.update(
                {name: size - largest[name] for name, size in sizes(service).items() if size > largest[name]}
            )
            await asyncio.sleep(0.002)

    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)

        async def ask() -> None:
            operation = sign_operation()
            try:
                answer = await stub.Execute(
                    pb.ExecuteRequest(operations=[operation]),
                    metadata=(("secfunet-session", session["session"]),),
                    timeout=PATIENCE,
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    outcomes["DEADLINE_EXCEEDED"] += 1  # the grid's word, or our own clock's
                    return
                outcomes[reason_of(error)] += 1
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and 0 < retry_of(error) <= 30:
                    advised.append(retry_of(error))
                return
            assert not answer.failures
            (result,) = grid.open("hv-a", answer.containers[0]).results
            assert result.request_id == operation.request_id
            pss = padding.PSS(padding.MGF1(SHA256()), 32)
            public.verify(result.output, operation.sign.digest, pss, utils.Prehashed(SHA256()))
            outcomes["OK"] += 1

        watching = asyncio.create_task(watch())
        # The grid knows its card's speed from the first one.
        await ask()
        await asyncio.gather(*(ask() for _ in range(calls)))
        watching.cancel()
    assert len(advised) == outcomes["SLOT_BUSY"] + outcomes["TOO_MANY_CALLS"], "each with a time to wait"
    return outcomes, dict(largest)


async def test_a_flood_is_refused_early_and_what_is_accepted_is_answered(slow: TestGrid) -> None:
    async with slow.running(slot_queue=FLOOD) as service:
        outcomes, largest = await flood(slow, service, calls=FLOOD)
        assert outcomes.total() == FLOOD + 1
        assert outcomes["OK"] >= 10, "the card went on"
        assert outcomes["SLOT_BUSY"] > 0, "and the grid did not let them wait in vain"
        # Of those that it took on the last ones may be late, on a busy machine: their time is guessed.
        assert outcomes["DEADLINE_EXCEEDED"] <= FLOOD / 2
        assert set(outcomes) <= {"OK", "SLOT_BUSY", "DEADLINE_EXCEEDED"}
        assert largest["queue"] <= PATIENCE / CARD_SECONDS + 1
        assert largest["flights"] <= FLOOD + 1
        assert largest["sessions"] == 1
        for _ in range(100):
            if not sum(sizes(service).values()) - 1:
                break
            await asyncio.sleep(0.05)
        assert sizes(service) == {"queue": 0, "flights": 0, "calls": 0, "sessions": 1}
        (bank,) = [bank for bank in service.rack.banks() if bank.name == "se-vm-1"]
        assert bank.queue.refused == outcomes["SLOT_BUSY"]


async def test_a_full_queue_holds_its_bound(slow: TestGrid, caplog: pytest.LogCaptureFixture) -> None:
    async with slow.running(slot_queue=8) as service:
        caplog.clear()
        began = time.monotonic()
        outcomes, largest = await flood(slow, service, calls=100)
        lines = [record for record in caplog.records if record.levelname == "WARNING"]
        assert 1 <= len(lines) <= 2 * (2 + time.monotonic() - began), "a flood does not flood the log"
        assert set(outcomes) == {"OK", "SLOT_BUSY"}
        assert largest["queue"] == 8
        assert outcomes["OK"] >= 9


async def test_a_hypervisor_has_a_share_of_calls(slow: TestGrid) -> None:
    async with slow.running(calls_per_hypervisor=12) as service:
        outcomes, largest = await flood(slow, service, calls=100)
        assert outcomes["TOO_MANY_CALLS"] > 0
        assert set(outcomes) <= {"OK", "TOO_MANY_CALLS", "SLOT_BUSY"}
        assert largest["calls"] == 12
        # Another hypervisor is not touched, and this one's places are free again.
        outcomes, _ = await flood(slow, service, calls=5)
        assert outcomes == {"OK": 6}


async def test_sessions_do_not_pile_up(slow: TestGrid) -> None:
    async with slow.running(sessions_per_vm=3) as service:
        for _ in range(8):
            await slow.session("vm-1", "hv-a")
            await slow.session("vm-2", "hv-a")
        assert len(service.sessions) == 6


async def test_a_neighbours_flood_does_not_fill_this_vms_queue(slow: TestGrid) -> None:
    async with slow.running(slot_queue=8) as service:
        session = await slow.session("vm-2", "hv-a")
        flooding = asyncio.create_task(flood(slow, service, calls=200))
        async with slow.channel("hv-a") as channel:
            stub = slow.stub(channel)
            for _ in range(5):
                answer = await stub.Execute(
                    pb.ExecuteRequest(operations=[sign_operation()]),
                    metadata=(("secfunet-session", session["session"]),),
                    timeout=20,
                )
                assert not answer.failures
        outcomes, _ = await flooding
        assert outcomes["SLOT_BUSY"] > 0


async def test_a_card_whose_settings_change_is_busy_meanwhile_and_not_gone(slow: TestGrid, tmp_path: Path) -> None:
    """Until the card is there by its new settings its VM is told to wait, never that the grid does not have its card."""
    async with slow.running() as service:
        rack, before = service.rack, service.settings
        seid = slow.vms["vm-1"].seid
        assert seid is not None
        pin = tmp_path / "pin"
        pin.touch(mode=0o600)
        pin.write_bytes(rack.elements[seid].user_pin_file.read_bytes())
        elements = tuple(
            one.model_copy(update={"user_pin_file": pin}) if one.seid == seid else one for one in before.secure_elements
        )
        bank = rack.vm(seid)
        assert bank is not None
        slow_job = bank.submit(lambda card: asyncio.sleep(0.3), deadline=time.monotonic() + 5)
        await asyncio.sleep(0.05)
        changing = asyncio.create_task(rack.change(before.model_copy(update={"secure_elements": elements})))
        while not changing.done():
            assert rack.vm(seid) is not None
            await asyncio.sleep(0.005)
        await slow_job
        assert await changing == [f"card {seid} changed"]
        new = rack.vm(seid)
        assert new is not None
        assert new is not bank
        await new.submit(lambda card: card.client.state(), deadline=time.monotonic() + 5)
        assert {slot.seid: slot.state.value for slot in rack.slots()}[seid] == "in_service"
