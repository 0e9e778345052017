"""Server cards that two kinds of borrowers share: hypervisors' logins and peers by RADIUS.

Neither can take every card: of two cards or more a part is kept for each use. Within a use a place that becomes free goes to the holder (a
RADIUS client) that has the fewest, so a crowd behind one holder does not keep the others waiting. A grid with a single card cannot keep a
part of it; there, and between holders, a borrower is asked to give its card back while its peer is silent (``Part.is_pressed``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Final

from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError
from secfunet.card.pool import CardPool

KEPT: Final = 4
"""One card in so many is kept for each use, and at least one of two."""
HOLDERS_KNOWN: Final = 1024
"""Holders whose last turn is remembered."""


class Gate:
    """At most ``limit()`` places; a free one goes to the waiting holder that has the fewest, among equals to the one whose last turn was
    longest ago.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._last_turn: OrderedDict[str, int] = OrderedDict()
        self._turns = 0
        self.held: Counter[str] = Counter()

    @property
    def inside(self) -> int:
        """Places that are taken."""
        return self.held.total()

    def waiting(self) -> set[str]:
        """The holders that wait."""
        return {holder for holder, turn in self._waiting if not turn.done()}

    @contextlib.asynccontextmanager
    async def place(self, holder: str) -> AsyncIterator[None]:
        """Waits for a place without bound: the caller brings its own timeout."""
        turn = asyncio.get_running_loop().create_future()
        entry = (holder, turn)
        self._waiting.append(entry)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(holder)
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(entry)
        try:
            yield
        finally:
            self._leave(holder)

    def _leave(self, holder: str) -> None:
        self.held[holder] -= 1
        if not self.held[holder]:
            del self.held[holder]
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.inside < self._limit():
            entry = min(self._waiting, key=lambda one: (self.held[one[0]], self._last_turn.get(one[0], 0)))
            self._waiting.remove(entry)
            holder, turn = entry
            if not turn.done():
                self.held[holder] += 1
                self._note_turn(holder)
                turn.set_result(None)

    def _note_turn(self, holder: str) -> None:
        self._turns += 1
        self._last_turn.pop(holder, None)
        self._last_turn[holder] = self._turns
        if len(self._last_turn) > HOLDERS_KNOWN:
            self._last_turn.popitem(last=False)


class Part:
    """The cards of one use: a CardPool."""

    def __init__(self, name: str, cards: CardPool, limit: Callable[[], int]) -> None:
        self._name = name
        self._cards = cards
        self._gate = Gate(limit)
        self._waits = 0
        self._has = 0
        self.other: Part | None = None

    @contextlib.asynccontextmanager
    async def lease(self, *, timeout: float, holder: str = "") -> AsyncIterator[CardClient]:
        """See CardPool.lease; ``holder``: whose share it is."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        async with contextlib.AsyncExitStack() as stack:
            self._waits += 1
            try:
                try:
                    async with asyncio.timeout_at(until):
                        await stack.enter_async_context(self._gate.place(holder))
                except TimeoutError:
                    raise CardBusyError(f"no server card became free for {self._name} within {timeout:g} s") from None
                left = max(0.0, until - loop.time())
                card = await stack.enter_async_context(self._cards.lease(timeout=left))
            finally:
                self._waits -= 1
            self._has += 1
            try:
                yield card
            finally:
                self._has -= 1

    def is_pressed(self, holder: str) -> bool:
        """Whether a card that ``holder`` has, and whose peer is silent, is due to somebody else: another holder waits that has fewer
        cards, or the other use waits and has none.
        """
        if any(self._gate.held[one] < self._gate.held[holder] for one in self._gate.waiting()):
            return True
        return self.other is not None and self.other._waits > 0 and self.other._has == 0


def share(cards: CardPool, in_service: Callable[[], int], one: str, other: str) -> tuple[Part, Part]:
    """The parts of two uses of the same cards; ``in_service``: how many cards there are now."""

    def limit() -> int:
        count = max(1, in_service())
        return count if count == 1 else count - max(1, count // KEPT)

    first, second = Part(one, cards, limit), Part(other, cards, limit)
    first.other, second.other = second, first
    return first, second
