"""Values that wait under a random name until somebody takes them: once, and not for long."""

from __future__ import annotations

import base64
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gose.errors import Reason, Refusal
from secfunet.service.rate import MAX_OWNERS, TokenBuckets

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Entry(Generic[Value]):
    value: Value
    owner: str
    until: float


class SingleUse(Generic[Value]):
    """At most ``limit`` values, at most ``per_owner`` of one owner, each for ``lifetime`` seconds. In memory: a restart forgets them.

    ``clock`` only ever goes forward: a time of day that is set back would let values live longer.
    Names are 43 characters of base64url, 256 random bits.
    """

    def __init__(
        self,
        *,
        limit: int,
        lifetime: float,
        per_owner: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        randbytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._limit = limit
        self._lifetime = lifetime
        self._per_owner = per_owner
        self._clock = clock
        self._randbytes = randbytes
        self._entries: OrderedDict[str, _Entry[Value]] = OrderedDict()
        self._owned: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, value: Value, *, owner: str = "") -> str:
        """Keeps ``value``; returns its name. When all is full the oldest goes. Raises Refusal TOO_MANY_LOGINS for an owner's bound."""
        self._purge()
        if self._per_owner is not None and self._owned.get(owner, 0) >= self._per_owner:
            raise Refusal(Reason.TOO_MANY_LOGINS, "too many logins have begun and not ended", retry_after=1.0)
        while len(self._entries) >= self._limit:
            self._remove(next(iter(self._entries)))
        name = base64.urlsafe_b64encode(self._randbytes(32)).rstrip(b"=").decode()
        self._entries[name] = _Entry(value, owner, self._clock() + self._lifetime)
        self._owned[owner] = self._owned.get(owner, 0) + 1
        return name

    def look(self, untrusted_name: str) -> Value | None:
        """The value, which stays; None if there is none."""
        self._purge()
        entry = self._entries.get(untrusted_name)
        return entry.value if entry is not None else None

    def take(self, untrusted_name: str) -> Value | None:
        """The value, for the first who asks; None for everybody else."""
        self._purge()
        if untrusted_name not in self._entries:
            return None
        return self._remove(untrusted_name).value

    def _remove(self, name: str) -> _Entry[Value]:
        entry = self._entries.pop(name)
        left = self._owned[entry.owner] - 1
        if left:
            self._owned[entry.owner] = left
        else:
            del self._owned[entry.owner]
        return entry

    def _purge(self) -> None:
        now = self._clock()
        # All live equally long, so they end in the order in which they came.
        while self._entries:
            name, entry = next(iter(self._entries.items()))
            if entry.until > now:
                return
            self._remove(name)


class RateLimit:
    """``limit`` events of one owner at once, and as many in each ``window`` seconds on the long run."""

    def __init__(
        self,
        *,
        limit: int,
        window: float,
        what: str = "logins",
        max_owners: int = MAX_OWNERS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._buckets = TokenBuckets(limit / window, limit, monotonic, max_owners=max_owners)

    def spend(self, owner: str) -> None:
        """Counts an event. Raises Refusal TOO_MANY_LOGINS."""
        wait = self._buckets.take(owner)
        if wait > 0:
            raise Refusal(Reason.TOO_MANY_LOGINS, f"too many {self._what} in a short time", retry_after=wait)
