"""Places that holders share: never more than there are, none is lost, and nobody waits behind a crowd."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gose.slots.shares import Gate, share
from secfunet.card.errors import CardBusyError
from secfunet.card.pool import CardPool

acts = st.lists(
    st.tuples(st.sampled_from("ABC"), st.sampled_from(("enter", "leave", "give up", "nothing"))), max_size=40
)


@given(acts=acts, limit=st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_places_are_bounded_and_none_is_lost(acts: list[tuple[str, str]], limit: int) -> None:
    asyncio.run(play(acts, limit))


async def play(acts: list[tuple[str, str]], limit: int) -> None:
    gate = Gate(lambda: limit)
    inside: dict[str, list[asyncio.Event]] = {holder: [] for holder in "ABC"}
    tasks: dict[str, list[asyncio.Task[None]]] = {holder: [] for holder in "ABC"}

    async def visit(holder: str) -> None:
        async with gate.place(holder):
            leave = asyncio.Event()
            inside[holder].append(leave)
            try:
                await leave.wait()
            finally:
                inside[holder].remove(leave)

    for holder, act in acts:
        if act == "enter":
            tasks[holder].append(asyncio.create_task(visit(holder)))
        elif act == "leave" and inside[holder]:
            inside[holder][0].set()
        elif act == "give up" and tasks[holder]:
            tasks[holder].pop().cancel()  # waiting, inside, or let in this very moment
        if act == "nothing":
            await asyncio.sleep(0)
        assert gate.inside <= limit
    await settled()
    waiting = gate.waiting()
    assert gate.inside == sum(map(len, inside.values()))
    assert not waiting or gate.inside == limit, "nobody waits while there is a place"
    for holder in "ABC":
        for task in tasks[holder]:
            task.cancel()
    await settled()
    assert gate.inside == 0
    async with gate.place("A"):
        pass


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_turns_go_around() -> None:
    gate = Gate(lambda: 1)
    served: list[str] = []

    async def visit(holder: str) -> None:
        async with gate.place(holder):
            served.append(holder)
            await settled()

    crowd = [asyncio.create_task(visit("crowd")) for _ in range(6)]
    await settled()
    others = [asyncio.create_task(visit(one)) for one in ("one", "two", "one")]
    await asyncio.wait([*crowd, *others])
    assert served[:2] == ["crowd", "one"] or served[:3] == ["crowd", "crowd", "one"]
    last = max(place for place, holder in enumerate(served) if holder != "crowd")
    assert last <= 6, served


class Cards:
    """So many cards that know how many are out."""

    def __init__(self, count: int) -> None:
        self.free = asyncio.Semaphore(count)

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float):  # type: ignore[no-untyped-def]
        async with asyncio.timeout(timeout):
            await self.free.acquire()
        try:
            yield object()
        finally:
            self.free.release()


@pytest.mark.parametrize(("count", "kept"), [(2, 1), (3, 1), (4, 1), (8, 2), (16, 4)])
async def test_a_part_is_kept_for_each_use(count: int, kept: int) -> None:
    cards: CardPool = Cards(count)
    for greedy, modest in (share(cards, lambda: count, "one", "two"), share(cards, lambda: count, "one", "two")[::-1]):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count - kept):
                await stack.enter_async_context(greedy.lease(timeout=1))
            with pytest.raises(CardBusyError):
                await stack.enter_async_context(greedy.lease(timeout=0.01))
            for _ in range(kept):
                await stack.enter_async_context(modest.lease(timeout=0.1))


async def test_a_single_card_is_asked_back_for_the_other_use() -> None:
    logins, radius = share(Cards(1), lambda: 1, "logins", "RADIUS")
    async with radius.lease(timeout=1, holder="nas"):
        assert not radius.is_pressed("nas")
        waiting = asyncio.create_task(logins.lease(timeout=1).__aenter__())
        await settled()
        assert radius.is_pressed("nas")
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not radius.is_pressed("nas")
