"""Slots over real card processes: exclusive, first come first served, bounded, watched."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from gose.cards import CardWays
from gose.metrics import Metrics
from gose.settings import Limits, SecureElementSettings
from gose.slots.bank import Bank
from gose.slots.connect import CardConnector, ReadyCard
from gose.slots.errors import CardUnavailableError, SlotBusyError, SlotClosedError, SlotDeadlineError
from gose.slots.slot import SlotState
from secfunet.apdu import StatusError
from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError, CardGoneError, LeaseEndedError
from secfunet.card.parameters import TLS_1_2, KeyAlgorithm, TlsParameters
from secfunet.card.unix import connect_unix
from secfunet.gose.v1 import operation_pb2
from tests.gose.grid import restart
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS = Limits(
    operation_timeout=0.5,
    card_connect_timeout=0.5,
    card_backoff=0.05,
    card_backoff_max=0.1,
    watchdog_interval=0.2,
    watchdog_timeout=0.2,
    slot_queue=4,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cards(short_folder: Path) -> AsyncIterator[list[CardProcess]]:
    """Two cards with a P-256 key each."""
    authority = CertificateAuthority()
    async with running_card(short_folder, name="one") as one, running_card(short_folder, name="two") as two:
        for card in (one, two):
            await personalise(card, authority, "vm", algorithm=KeyAlgorithm.P_256)
        yield [one, two]


def element(card: CardProcess, **changes: object) -> SecureElementSettings:
    return SecureElementSettings.model_validate(
        {"seid": card.socket.stem, "socket": card.socket, "role": "vm", "user_pin_file": card.user_pin_file, **changes}
    )


def bank_of(cards: Sequence[CardProcess], limits: Limits = LIMITS) -> Bank:
    return Bank(
        "bank",
        [(card.socket.stem, CardConnector(element(card), limits, CardWays())) for card in cards],
        limits,
        Metrics(),
    )


async def sign(card: ReadyCard) -> bytes:
    return await card.client.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32))


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


async def settle(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture(loop_scope="module")
async def bank(cards: list[CardProcess]) -> AsyncIterator[Bank]:
    bank = bank_of(cards[:1])
    await bank.start()
    yield bank
    await bank.close()


async def test_jobs_run_in_their_order_and_alone(bank: Bank) -> None:
    running = 0
    order = []

    def job(number: int) -> Callable[[ReadyCard], Awaitable[int]]:
        async def work(card: ReadyCard) -> int:
            nonlocal running
            running += 1
            assert running == 1
            await sign(card)
            await asyncio.sleep(0)
            running -= 1
            order.append(number)
            return number

        return work

    assert await asyncio.gather(*(bank.submit(job(number), deadline=soon()) for number in range(4))) == [0, 1, 2, 3]
    assert order == [0, 1, 2, 3]


async def test_a_full_queue_refuses(bank: Bank) -> None:
    gate = asyncio.Event()

    async def wait(card: ReadyCard) -> None:
        await gate.wait()

    first = bank.submit(wait, deadline=soon())
    await asyncio.sleep(0.01)
    waiting = [bank.submit(sign, deadline=soon()) for _ in range(LIMITS.slot_queue)]
    with pytest.raises(SlotBusyError) as caught:
        bank.submit(sign, deadline=soon())
    assert caught.value.waiting == LIMITS.slot_queue
    assert caught.value.retry_after > 0
    gate.set()
    await first
    assert all(await asyncio.gather(*waiting))
    assert await bank.submit(sign, deadline=soon())


async def test_expired_and_cancelled_jobs_leave_the_card_alone(bank: Bank) -> None:
    gate = asyncio.Event()
    worked = []

    async def wait(card: ReadyCard) -> None:
        await gate.wait()

    async def work(card: ReadyCard) -> None:
        worked.append(card)

    first = bank.submit(wait, deadline=soon())
    await asyncio.sleep(0.01)
    expired = bank.submit(work, deadline=soon(0.05))
    cancelled = bank.submit(work, deadline=soon())
    cancelled.cancel()
    more = [bank.submit(work, deadline=soon(0.05)) for _ in range(LIMITS.slot_queue - 2)]
    await asyncio.sleep(0.1)
    # Room is made of those that have expired.
    last = bank.submit(sign, deadline=soon())
    gate.set()
    await first
    assert await last
    for job in (expired, *more):
        with pytest.raises(SlotDeadlineError):
            await job
    assert not worked


async def test_a_jobs_own_error_is_its_own(bank: Bank) -> None:
    async def wrong(card: ReadyCard) -> bytes:
        return await card.client.sign(99, bytes(32))

    async def fault(card: ReadyCard) -> None:
        raise ValueError("mine")

    with pytest.raises(StatusError):
        await bank.submit(wrong, deadline=soon())
    with pytest.raises(ValueError, match="mine"):
        await bank.submit(fault, deadline=soon())
    assert await bank.submit(sign, deadline=soon())
    assert bank.slots[0].state is SlotState.IN_SERVICE


async def test_a_killed_card(bank: Bank, cards: list[CardProcess]) -> None:
    gate = asyncio.Event()

    async def killed_in_the_middle(card: ReadyCard) -> bytes:
        await sign(card)
        gate.set()
        await asyncio.sleep(0.1)
        return await sign(card)

    job = bank.submit(killed_in_the_middle, deadline=soon())
    behind = bank.submit(sign, deadline=soon())
    await gate.wait()
    await cards[0].kill()
    for one in (job, behind):
        with pytest.raises(CardUnavailableError) as caught:
            await asyncio.wait_for(one, 2)
        assert caught.value.retry_after > 0
    await settle(lambda: bank.slots[0].state is SlotState.OUT_OF_SERVICE)
    with pytest.raises(CardUnavailableError):
        bank.submit(sign, deadline=soon())
    await restart(cards[0])
    await settle(lambda: bank.slots[0].state is SlotState.IN_SERVICE)
    assert await bank.submit(sign, deadline=soon())


async def test_a_card_that_hangs_in_an_operation(bank: Bank, cards: list[CardProcess]) -> None:
    process = cards[0].process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(CardUnavailableError):
            await bank.submit(sign, deadline=soon())
        assert 0.4 < time.monotonic() - began < 1.5
        await settle(lambda: bank.slots[0].state is SlotState.OUT_OF_SERVICE)
    finally:
        process.send_signal(signal.SIGCONT)
    await settle(lambda: bank.slots[0].state is SlotState.IN_SERVICE)
    assert await bank.submit(sign, deadline=soon())


async def test_an_idle_card_that_hangs_is_noticed(bank: Bank, cards: list[CardProcess]) -> None:
    process = cards[0].process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        # Nobody asks anything of it.
        await settle(lambda: bank.slots[0].state is SlotState.OUT_OF_SERVICE)
    finally:
        process.send_signal(signal.SIGCONT)
    await settle(lambda: bank.slots[0].state is SlotState.IN_SERVICE)


async def sign_ahead(card: ReadyCard) -> bytes:
    """As the service provider's jobs do: the next one's command may follow."""
    card.sending_last()
    return await sign(card)


@pytest_asyncio.fixture(loop_scope="module")
async def slow_bank(tmp_path: Path) -> AsyncIterator[tuple[Bank, CardProcess]]:
    """A card that takes 50 ms for a signature."""
    settings = "[benchmark_latency]\nprivate_key = 0.05\nkey_pair = 0\ncommand = 0"
    async with running_card(tmp_path, settings=settings) as card:
        await personalise(card, CertificateAuthority(), "vm", algorithm=KeyAlgorithm.P_256)
        bank = bank_of([card])
        await bank.start()
        yield bank, card
        await bank.close()


async def test_a_busy_card_has_its_next_job_already(slow_bank: tuple[Bank, CardProcess]) -> None:
    """One more, and not two: what waits in the queue can still be refused, cancelled, or go elsewhere."""
    bank, _ = slow_bank
    under_way: list[int] = []
    most = 0

    def job(number: int) -> Callable[[ReadyCard], Awaitable[int]]:
        async def work(card: ReadyCard) -> int:
            nonlocal most
            under_way.append(number)
            most = max(most, len(under_way))
            card.sending_last()
            assert await sign(card)
            assert under_way[0] == number, "first in, first out"
            under_way.remove(number)
            return number

        return work

    assert await asyncio.gather(*(bank.submit(job(number), deadline=soon()) for number in range(4))) == [0, 1, 2, 3]
    assert most == 2
    figures = bank.slots[0].figures
    worked = figures.worked.quantiles()
    assert worked is not None
    assert 0.04 < worked.p50 < 0.09, "a job's time in the card does not count what it waited there for the one before"


async def test_work_that_does_not_say_so_is_alone(slow_bank: tuple[Bank, CardProcess]) -> None:
    bank, _ = slow_bank
    ahead = bank.submit(sign_ahead, deadline=soon())
    async with bank.lease(timeout=5) as card:
        assert ahead.done() or not await asyncio.sleep(0.2)
        behind = bank.submit(sign_ahead, deadline=soon())
        await card.state()
        assert not behind.done()
        await asyncio.sleep(0.1)
        assert not behind.done()
    assert await ahead
    assert await behind


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_card_dies_with_two_jobs(slow_bank: tuple[Bank, CardProcess], death: signal.Signals) -> None:
    bank, card = slow_bank
    jobs = [bank.submit(sign_ahead, deadline=soon()) for _ in range(2)]
    third = bank.submit(sign_ahead, deadline=soon())
    await asyncio.sleep(0.02)
    assert card.process is not None
    card.process.send_signal(death)
    for job in jobs:
        with pytest.raises(CardUnavailableError):
            await asyncio.wait_for(job, 2)
    with pytest.raises(CardUnavailableError):
        await asyncio.wait_for(third, 3)
    await settle(lambda: bank.slots[0].state is SlotState.OUT_OF_SERVICE)
    if death is signal.SIGSTOP:
        card.process.send_signal(signal.SIGCONT)
    else:
        await card.process.wait()
        await restart(card)
    await settle(lambda: bank.slots[0].state is SlotState.IN_SERVICE, timeout=20)
    assert await bank.submit(sign_ahead, deadline=soon())


async def test_a_bank_is_closed_with_two_jobs_in_the_card(slow_bank: tuple[Bank, CardProcess]) -> None:
    bank, _ = slow_bank
    jobs = [bank.submit(sign_ahead, deadline=soon()) for _ in range(2)]
    await asyncio.sleep(0.02)
    await bank.close()
    for job in jobs:
        with pytest.raises((CardUnavailableError, SlotClosedError)):
            await job


async def test_a_wrong_pin_is_tried_once(cards: list[CardProcess], short_folder: Path) -> None:
    pin_file = short_folder / "pin"
    pin_file.touch(0o600)
    pin_file.write_bytes(b"0000")
    bank = Bank(
        "bank",
        [("one", CardConnector(element(cards[0], user_pin_file=pin_file), LIMITS, CardWays()))],
        LIMITS,
        Metrics(),
    )
    client = await cards[0].connect()
    full = await client.pin_attempts()
    await client.close()
    await bank.start()
    try:
        assert bank.slots[0].state is SlotState.OUT_OF_SERVICE
        await asyncio.sleep(0.5)  # several attempts to connect
        assert "PIN" in bank.slots[0].cause
        client = CardClient(await connect_unix(cards[0].socket, timeout=1))
        await client.select()
        assert await client.pin_attempts() == full - 1, "one attempt was spent, and no more"
        await client.close()
        # The administrator writes the right one, and the slot heals by itself.
        pin_file.write_bytes(cards[0].user_pin)
        attempts: list[int] = []

        async def ask(card: ReadyCard) -> None:
            attempts.append(await card.client.pin_attempts())

        await settle(lambda: bank.slots[0].state is SlotState.IN_SERVICE)
        await bank.submit(ask, deadline=soon())
        assert attempts == [full], "verified: all attempts are back"
    finally:
        await bank.close()


async def test_a_closed_bank(cards: list[CardProcess]) -> None:
    bank = bank_of(cards[:1])
    await bank.start()
    gate = asyncio.Event()

    async def wait(card: ReadyCard) -> None:
        await gate.wait()

    running = bank.submit(wait, deadline=soon())
    await asyncio.sleep(0.01)
    waiting = bank.submit(sign, deadline=soon())
    await bank.close()
    with pytest.raises(CardUnavailableError):
        await running
    with pytest.raises(SlotClosedError):
        await waiting
    with pytest.raises(SlotClosedError):
        bank.submit(sign, deadline=soon())


# --- the pool of cards that can stand in for each other


async def test_leases_of_two_cards(cards: list[CardProcess]) -> None:
    bank = bank_of(cards)
    await bank.start()
    try:
        async with bank.lease(timeout=1) as one, bank.lease(timeout=1) as two:
            assert await one.certificate() != await two.certificate()
            began = time.monotonic()
            with pytest.raises(CardBusyError):
                async with bank.lease(timeout=0.3):
                    pass
            assert 0.25 < time.monotonic() - began < 1
            third = asyncio.create_task(_lease_and_sign(bank))
            await asyncio.sleep(0.05)
            assert not third.done()
        assert await third
        with pytest.raises(LeaseEndedError):
            await one.state()
    finally:
        await bank.close()


async def _lease_and_sign(bank: Bank) -> bytes:
    async with bank.lease(timeout=2) as card:
        return await card.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32))


async def test_leases_are_first_come_first_served(cards: list[CardProcess]) -> None:
    bank = bank_of(cards[:1])
    await bank.start()
    order: list[int] = []

    async def borrow(number: int) -> None:
        async with bank.lease(timeout=2):
            order.append(number)
            await asyncio.sleep(0.01)

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(borrow(number))
                await asyncio.sleep(0)
        assert order == [0, 1, 2, 3]
        # One that gives up does not keep the card from the others.
        async with bank.lease(timeout=1):
            quitter = asyncio.create_task(borrow(9))
            await asyncio.sleep(0.02)
            quitter.cancel()
        assert await _lease_and_sign(bank)
        assert 9 not in order
    finally:
        await bank.close()


async def test_a_forgotten_lease_is_taken_back(cards: list[CardProcess]) -> None:
    bank = bank_of(cards[:1], LIMITS.model_copy(update={"longest_lease": 0.2}))
    await bank.start()
    try:
        async with bank.lease(timeout=1) as forgotten:
            assert await _lease_and_sign(bank), "another one has it"
            with pytest.raises(LeaseEndedError):
                await forgotten.state()
    finally:
        await bank.close()


async def test_a_pool_without_a_living_card(cards: list[CardProcess]) -> None:
    bank = bank_of(cards)
    await bank.start()
    try:
        await cards[0].kill()
        await settle(lambda: bank.slots[0].state is SlotState.OUT_OF_SERVICE)
        for _ in range(3):
            assert await _lease_and_sign(bank), "the other card is there"
        await cards[1].kill()
        await settle(lambda: bank.slots[1].state is SlotState.OUT_OF_SERVICE)
        with pytest.raises(CardGoneError):
            async with bank.lease(timeout=1):
                pass
    finally:
        for card in cards:
            await restart(card)
        await settle(lambda: all(slot.state is SlotState.IN_SERVICE for slot in bank.slots))
        assert await _lease_and_sign(bank)
        await bank.close()


async def test_a_grid_without_server_cards() -> None:
    bank = bank_of([])
    await bank.start()
    with pytest.raises(CardGoneError):
        async with bank.lease(timeout=1):
            pass
    await bank.close()


async def test_a_lent_card_keeps_nothing_of_its_borrower(cards: list[CardProcess]) -> None:
    """A borrower that ends in the middle of a handshake, or takes another identity: the next one sees neither."""
    bank = bank_of(cards[:1])
    await bank.start()
    try:
        async with bank.lease(timeout=5) as card:
            await card.set_tls_parameters(TlsParameters(server_name="victim.example", max_version=TLS_1_2))
            await card.reset_state()
            assert b"victim.example" in await card.process_eap(bytes.fromhex("010000060D20"))
        async with bank.lease(timeout=5) as card:
            await card.reset_state()
            assert b"victim.example" not in await card.process_eap(bytes.fromhex("010000060D20"))
        done = bank.slots[0].jobs_done
        async with bank.lease(timeout=5) as card:
            await card.select()  # nobody is verified any more
        async with bank.lease(timeout=5) as card:
            await card.state()
        assert bank.slots[0].jobs_done > done
    finally:
        await bank.close()
