"""Single sign-on: a login may serve later requests of the same hypervisor, for a bounded time.

The cookie is a bearer secret, but what it buys is an assertion that names the hypervisor; the service provider believes that assertion only
over a connection which that hypervisor's card opened. Its hash is kept, and it dies when the hypervisor is revoked.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable

SCHEMA = """
CREATE TABLE IF NOT EXISTS sign_ons (
    cookie_hash BLOB PRIMARY KEY,
    hvid TEXT NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
"""


class SignOns:
    """Logins that still count."""

    def __init__(
        self,
        database: sqlite3.Connection,
        *,
        lifetime: float,
        clock: Callable[[], float] = time.time,
        randbytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._database = database
        self.lifetime = lifetime
        self._clock = clock
        self._randbytes = randbytes
        database.executescript(SCHEMA)

    def remember(self, hvid: str) -> str:
        """A login has happened, now; returns the cookie's value. The hypervisor's earlier cookies end."""
        now = self._clock()
        cookie = base64.urlsafe_b64encode(self._randbytes(32)).rstrip(b"=").decode()
        self._database.execute("DELETE FROM sign_ons WHERE until <= ? OR hvid = ?", (now, hvid))
        self._database.execute("INSERT INTO sign_ons VALUES (?, ?, ?)", (_hash(cookie), hvid, now + self.lifetime))
        return cookie

    def hypervisor(self, untrusted_cookie: str) -> str | None:
        """The thumbprint of the hypervisor whose login this is; None if it counts no longer."""
        row = self._database.execute(
            "SELECT hvid FROM sign_ons WHERE cookie_hash = ? AND until > ?", (_hash(untrusted_cookie), self._clock())
        ).fetchone()
        return str(row[0]) if row is not None else None


def _hash(cookie: str) -> bytes:
    return hashlib.sha256(cookie.encode("utf-8", "surrogateescape")).digest()
