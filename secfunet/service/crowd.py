"""Who is inside, at most so many, and who has to leave when one more comes: no IO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Member = TypeVar("Member")


class Crowd(Generic[Member]):
    """At most ``limit`` members, at most ``per_holder`` of them of one holder (an address, or the owner of a certificate).

    When it is full, the holder with the most members has to give a place: the oldest one that may leave. So who comes from elsewhere
    always finds room beside a flood from one place, and a flood from one place only replaces its own members.
    """

    def __init__(self, limit: int, per_holder: int | None = None) -> None:
        self.limit = limit
        self._per_holder = per_holder if per_holder is not None else limit
        self._holders: dict[str, dict[Member, None]] = {}  # in the order in which they came
        self._holder_of: dict[Member, str] = {}

    def __len__(self) -> int:
        return len(self._holder_of)

    def __contains__(self, member: Member) -> bool:
        return member in self._holder_of

    def holder_of(self, member: Member) -> str | None:
        """Under whom it is counted."""
        return self._holder_of.get(member)

    def members(self) -> list[Member]:
        """Those inside, the oldest first."""
        return list(self._holder_of)

    def add(self, member: Member, holder: str) -> None:
        """Counts it. Whether there is room is the caller's to see to (``is_full_for``, ``victim``)."""
        self._holder_of[member] = holder
        self._holders.setdefault(holder, {})[member] = None

    def remove(self, member: Member) -> None:
        """It has left; no matter whether it was inside."""
        holder = self._holder_of.pop(member, None)
        if holder is not None:
            del self._holders[holder][member]
            if not self._holders[holder]:
                del self._holders[holder]

    def is_full_for(self, holder: str) -> bool:
        """Whether somebody has to leave before one more of ``holder`` comes in."""
        return len(self) >= self.limit or len(self._holders.get(holder, ())) >= self._per_holder

    def victim(self, holder: str, may_leave: Callable[[Member], bool] = lambda _: True) -> Member | None:
        """Who leaves so that one more of ``holder`` finds a place; None if nobody may."""
        own = self._holders.get(holder, {})
        if len(own) < self._per_holder:
            own = max(self._holders.values(), key=len, default={})
        return next((member for member in own if may_leave(member)), None)
