"""Where each VM is: on the hypervisor that the newest of its VM-Auth-Tokens names, of those that were used.

A VM uses its key from one hypervisor at a time. When it is migrated it gets a token for the new one; from that token's first use on, all
that were issued before it for another hypervisor are worth nothing. A token that was issued but never used changes nothing, so a
migration that fails leaves the VM its key where it is. Whatever happened, a token that is issued now puts the VM where that says.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from gose.errors import Reason, Refusal

SCHEMA = """
CREATE TABLE IF NOT EXISTS places (
    vmid TEXT PRIMARY KEY,
    hvid TEXT NOT NULL,
    issued_at REAL NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Claim:
    """A VM-Auth-Token puts the VM there. ``issued_at``: by the registry, which issues no two tokens of a VM at the same time."""

    vmid: str
    hvid: str
    issued_at: float


class Places:
    """One row a VM that ever used its key; ``database`` is shared with the sessions."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.executescript(SCHEMA)

    def check(self, claim: Claim) -> None:
        """Raises Refusal VM_ELSEWHERE if the VM used a newer token from another hypervisor."""
        place = self._place(claim.vmid)
        if place is not None and place.hvid != claim.hvid and place.issued_at >= claim.issued_at:
            raise Refusal(
                Reason.VM_ELSEWHERE,
                "this VM has moved to another hypervisor; here it needs a VM-Auth-Token that was issued since",
                detail=f"{claim.vmid} is on {place.hvid}, by a newer token than the one for {claim.hvid}",
            )

    def take(self, claim: Claim) -> bool:
        """From now on the VM is there; True if it was elsewhere. Raises as ``check`` does."""
        self.check(claim)
        place = self._place(claim.vmid)
        if place is not None and place.hvid == claim.hvid and place.issued_at >= claim.issued_at:
            return False  # an older token for the same hypervisor takes nothing back
        self._database.execute(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?)", (claim.vmid, claim.hvid, claim.issued_at)
        )
        return place is not None and place.hvid != claim.hvid

    def _place(self, vmid: str) -> Claim | None:
        row = self._database.execute("SELECT vmid, hvid, issued_at FROM places WHERE vmid = ?", (vmid,)).fetchone()
        return Claim(*row) if row is not None else None
