"""VM-Auth-Tokens that come to their end: seen, and said, while there is time to give the VM a new one.

A token is renewed without a pause (``StartVm`` of a running VM, ``secure-middleware vm start --token-file``), but by somebody who
has to know of it. So a VM says that its token ends soon (``vm list``, ``GetVm``, events), a metric tells when the next one ends, and the
log has a line for each token, once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable

from dom0_middleware.metrics import Metrics
from dom0_middleware.state import StateStore
from secfunet.vm_auth_token import TokenError, unverified_claims

log = logging.getLogger(__name__)

LAST_PART = 0.25  # of a token's life
AT_MOST = 7 * 86_400.0  # seconds
INTERVAL = 30.0  # seconds between looks


def ends_soon(token: str, now: float) -> bool:
    """In the last quarter of its life, or the last week if that is shorter; also when it has ended. False for "", no token."""
    if not token:
        return False
    try:
        claims = unverified_claims(token)
    except TokenError:
        return True
    return claims.expires_at - now <= min((claims.expires_at - claims.not_before) * LAST_PART, AT_MOST)


class TokenWatch:
    """``run`` looks at the tokens of all VMs, again and again, until it is cancelled."""

    def __init__(self, store: StateStore, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._told: dict[str, bytes] = {}

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(INTERVAL)

    def look(self) -> None:
        """Sets the metrics, and writes a line for each token that it sees at its end for the first time."""
        now, first, ending = self._clock(), 0, 0
        told: dict[str, bytes] = {}
        for record in self._store.vms():
            if record.revoked or not record.vm_auth_token:
                continue
            try:
                expiry = unverified_claims(record.vm_auth_token).expires_at
            except TokenError:
                continue
            first = min(first or expiry, expiry)
            if not ends_soon(record.vm_auth_token, now):
                continue
            ending += 1
            digest = hashlib.sha256(record.vm_auth_token.encode()).digest()
            told[record.uuid] = digest
            if self._told.get(record.uuid) != digest:
                log.warning(
                    "the VM-Auth-Token of a VM %s: give it a new one ('secure-middleware vm start --token-file')",
                    "has expired" if expiry <= now else "expires soon",
                    extra={"vm": record.uuid, "name_of_vm": record.name, "expires_at": expiry},
                )
        self._told = told
        self._metrics.next_token_end.set(first)
        self._metrics.tokens_ending.set(ending)
