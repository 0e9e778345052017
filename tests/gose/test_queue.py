"""The queue before a card: what would come too late is refused when it comes, and what is known of the card's speed heals itself."""

from __future__ import annotations

import asyncio

import pytest

from gose.slots.errors import CardUnavailableError, SlotBusyError
from gose.slots.queue import JobQueue


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Card:
    """A worker that takes jobs by hand: ``work`` says how long the next one took, in operations."""

    def __init__(self, queue: JobQueue[None], clock: Clock) -> None:
        self.queue = queue
        self.clock = clock

    async def work(self, seconds_each: float | None) -> None:
        job = await self.queue.take(idle=0)
        assert job is not None
        if seconds_each is not None:
            self.clock.now += seconds_each * job.operations
        job.succeed(None)
        self.queue.job_ended(job, seconds_each)


async def nothing(_: None) -> None:
    """The work of a job that nobody runs."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> JobQueue[None]:
    return JobQueue("card", 10, clock)


async def test_a_job_whose_turn_would_come_too_late_is_refused_at_once(queue: JobQueue[None], clock: Clock) -> None:
    card = Card(queue, clock)
    queue.put(nothing, deadline=clock.now + 1)
    await card.work(0.5)
    for _ in range(4):
        queue.put(nothing, deadline=clock.now + 2.5)
    assert queue.expected_wait() == pytest.approx(2.0)
    with pytest.raises(SlotBusyError) as caught:
        queue.put(nothing, deadline=clock.now + 2.2)
    assert caught.value.retry_after == pytest.approx(0.3), "then the same patience suffices"
    assert queue.refused == 1
    queue.put(nothing, deadline=clock.now + 2.5)
    await card.work(0.5)
    assert len(queue) == 4


async def test_operations_count_and_workers_share(queue: JobQueue[None], clock: Clock) -> None:
    card = Card(queue, clock)
    queue.put(nothing, deadline=clock.now + 1, operations=4)
    await card.work(0.1)
    queue.put(nothing, deadline=clock.now + 60, operations=64)
    assert queue.expected_wait() == pytest.approx(6.4)
    job = await queue.take(idle=0)
    assert job is not None
    assert queue.expected_wait() == pytest.approx(3.2), "half of it is done, on average"
    queue.workers = lambda: 4
    assert queue.expected_wait() == pytest.approx(0.8)
    queue.give_back(job)
    assert queue.expected_wait() == pytest.approx(1.6)


async def test_an_empty_queue_takes_any_job_so_that_a_wrong_estimate_heals(queue: JobQueue[None], clock: Clock) -> None:
    card = Card(queue, clock)
    queue.put(nothing, deadline=clock.now + 1)
    await card.work(100.0)
    for _ in range(100):
        queue.put(nothing, deadline=clock.now + 0.5)
        await card.work(0.01)
    for _ in range(5):
        queue.put(nothing, deadline=clock.now + 2)
    assert queue.expected_wait() < 2


async def test_a_card_that_died_says_nothing_about_its_speed(queue: JobQueue[None], clock: Clock) -> None:
    card = Card(queue, clock)
    queue.put(nothing, deadline=clock.now + 1)
    await card.work(None)
    assert queue.expected_wait() == 0.0
    queue.put(nothing, deadline=clock.now + 1)
    await card.work(0.5)
    queue.put(nothing, deadline=clock.now + 1)
    assert queue.expected_wait() == pytest.approx(0.5)
    queue.refuse(lambda: CardUnavailableError("card", "dead", 1.0))
    assert queue.expected_wait() == 0.0, "whoever waited was told"


async def test_jobs_nobody_waits_for_make_room(queue: JobQueue[None], clock: Clock) -> None:
    card = Card(queue, clock)
    queue.put(nothing, deadline=clock.now + 1)
    await card.work(1.0)
    waiting = [queue.put(nothing, deadline=clock.now + 100) for _ in range(3)]
    with pytest.raises(SlotBusyError):
        queue.put(nothing, deadline=clock.now + 1)
    for one in waiting:
        one.cancel()
    queue.put(nothing, deadline=clock.now + 1)
    assert len(queue) == 1


async def test_a_full_queue_refuses_whatever_the_deadline(queue: JobQueue[None], clock: Clock) -> None:
    for _ in range(10):
        queue.put(nothing, deadline=clock.now + 1000)
    with pytest.raises(SlotBusyError) as caught:
        queue.put(nothing, deadline=clock.now + 1000)
    assert caught.value.waiting == 10
    assert 0 < caught.value.retry_after <= 30
    assert len(queue) == 10
    await asyncio.sleep(0)
