"""Where associations and used nonces are kept. One store may serve a provider and a relying party; its bounds are its own."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol

from secfunet.openid.association import Association, AssociationKind


class OpenIdStore(Protocol):
    """What provider and relying party need kept. Each method is atomic, also between processes that share a store."""

    def save_association(self, association: Association) -> None:
        """Keeps it. A store that is full forgets the one of the same kind that was saved first."""

    def find_association(
        self, kind: AssociationKind, endpoint: str, handle: str | None, now: float
    ) -> Association | None:
        """The unexpired association with this handle, or (None) the one that lives longest."""

    def remove_association(self, kind: AssociationKind, endpoint: str, handle: str) -> bool:
        """Forgets it. True for the one caller that removed it."""

    def use_nonce(self, endpoint: str, nonce: str, keep_until: float, now: float) -> bool:
        """True for the first caller with this nonce. It is remembered until ``keep_until``; a store that is full of nonces that must still
        be remembered answers False: it cannot know."""


class MemoryStore:
    """A store in memory: what it knew is gone with the process, so every association of before is unknown then."""

    def __init__(self, *, max_associations: int = 1000, max_nonces: int = 100_000) -> None:
        self._max_associations = max_associations
        self._max_nonces = max_nonces
        self._associations: dict[AssociationKind, OrderedDict[tuple[str, str], Association]] = {
            kind: OrderedDict() for kind in AssociationKind
        }
        self._nonces: set[tuple[str, str]] = set()
        self._nonces_by_time: list[tuple[float, str, str]] = []

    def save_association(self, association: Association) -> None:
        kept = self._associations[association.kind]
        kept[(association.endpoint, association.handle)] = association
        while len(kept) > self._max_associations:
            kept.popitem(last=False)

    def find_association(
        self, kind: AssociationKind, endpoint: str, handle: str | None, now: float
    ) -> Association | None:
        kept = self._associations[kind]
        if handle is not None:
            found = kept.get((endpoint, handle))
            return found if found is not None and found.expires_at > now else None
        alive = [one for one in kept.values() if one.endpoint == endpoint and one.expires_at > now]
        return max(alive, key=lambda one: one.expires_at, default=None)

    def remove_association(self, kind: AssociationKind, endpoint: str, handle: str) -> bool:
        return self._associations[kind].pop((endpoint, handle), None) is not None

    def use_nonce(self, endpoint: str, nonce: str, keep_until: float, now: float) -> bool:
        while self._nonces_by_time and self._nonces_by_time[0][0] < now:
            _, *old = heapq.heappop(self._nonces_by_time)
            self._nonces.discard((old[0], old[1]))
        if (endpoint, nonce) in self._nonces or len(self._nonces) >= self._max_nonces:
            return False
        self._nonces.add((endpoint, nonce))
        heapq.heappush(self._nonces_by_time, (keep_until, endpoint, nonce))
        return True
