"""Sessions: what a hypervisor is granted for one VM after its login.

A session is bound to HVID and VMID, ends with its VM-Auth-Token at the latest, and is worth nothing over a connection that the
hypervisor's card did not open. The secret is 32 random bytes; the grid keeps only its SHA-256, so the state on disk logs nobody in.
Rules, in the order of ``SessionStore.check``: known, not closed, not expired, the connection's hypervisor, nothing revoked.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.places import Claim, Places
from gose.settings import Limits

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    secret_hash BLOB PRIMARY KEY,
    vmid TEXT NOT NULL,
    hvid TEXT NOT NULL,
    seid TEXT NOT NULL,
    token_id TEXT NOT NULL,
    operations TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL
) WITHOUT ROWID;
"""


class Standing(Protocol):
    """Who has not been revoked; a revocation by another process is seen at once."""

    def check(self, *, vmid: str, hvid: str, token_id: str) -> None:
        """Raises Refusal if the VM, the hypervisor or the token has been revoked or is unknown."""
        ...


@dataclass(eq=False, slots=True)
class Session:
    """What a session is worth. ``key`` is the SHA-256 of its secret; ``name`` is for logs. Times are UTC seconds."""

    key: bytes = field(repr=False)
    vmid: str
    hvid: str
    seid: str
    token_id: str
    operations: frozenset[str]
    created_at: float
    expires_at: float
    is_open: bool = True
    # What the executor keeps for this session (its container sealer).
    scratch: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Eight hexadecimal digits: enough to follow a session through the log, worth nothing to whoever reads it there."""
        return self.key[:4].hex()


class SessionStore:
    """Every live session, in memory and in SQLite: a grid that restarts still knows them."""

    def __init__(
        self,
        database: sqlite3.Connection,
        standing: Standing,
        limits: Limits,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
        randbytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._database = database
        self._standing = standing
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._randbytes = randbytes
        self._sessions: dict[bytes, Session] = {}
        database.executescript(SCHEMA)
        self.places = Places(database)
        self._load()

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> tuple[Session, ...]:
        """Every session, the oldest first; some may have ended, or been revoked, since they were last used."""
        return tuple(sorted(self._sessions.values(), key=lambda session: session.created_at))

    def live(self) -> tuple[Session, ...]:
        """Those that are of use still, the oldest first; what has ended or was revoked is closed."""
        self.purge()
        for session in self.all():
            with contextlib.suppress(Refusal):
                self.check(session, session.hvid)
        return self.all()

    def grant(
        self,
        *,
        vmid: str,
        hvid: str,
        seid: str,
        token_id: str,
        operations: Iterable[str],
        token_issued_at: float,
        token_expires_at: float,
    ) -> tuple[str, Session]:
        """Makes a session; returns its secret (43 characters, base64url) and the session.

        A VM that has its number of sessions already loses the oldest one: a middleware that was killed could not close its own. A VM that
        comes from another hypervisor loses those that it has there (see ``places``). Raises Refusal: VM_ELSEWHERE; TOO_MANY_SESSIONS when
        the hypervisor has too many.
        """
        now = self._clock()
        self.purge()
        self.places.check(Claim(vmid, hvid, token_issued_at))
        mine = [session for session in self._sessions.values() if session.hvid == hvid]
        same_vm = sorted((one for one in mine if one.vmid == vmid), key=lambda one: one.created_at)
        for oldest in same_vm[: max(0, len(same_vm) - self._limits.sessions_per_vm + 1)]:
            log.info("a newer session of the VM takes the place of its oldest", extra={"session": oldest.name})
            self.close(oldest)
            mine.remove(oldest)
        if len(mine) >= self._limits.sessions_per_hypervisor:
            raise Refusal(Reason.TOO_MANY_SESSIONS, "this hypervisor has too many sessions", retry_after=30.0)
        self._move(Claim(vmid, hvid, token_issued_at))
        secret = base64.urlsafe_b64encode(self._randbytes(32)).rstrip(b"=").decode()
        session = Session(
            key=_key(secret),
            vmid=vmid,
            hvid=hvid,
            seid=seid,
            token_id=token_id,
            operations=frozenset(operations),
            created_at=now,
            expires_at=min(token_expires_at, now + self._limits.session_lifetime),
        )
        self._database.execute(
            "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (session.key, vmid, hvid, seid, token_id, ",".join(sorted(session.operations)), now, session.expires_at),
        )
        self._sessions[session.key] = session
        self._metrics.sessions_granted.inc()
        self._count()
        return secret, session

    def find(self, untrusted_secret: str) -> Session:
        """The session of this secret. Raises Refusal SESSION_UNKNOWN. Not checked yet: see ``check``."""
        session = self._sessions.get(_key(untrusted_secret))
        if session is None:
            raise Refusal(Reason.SESSION_UNKNOWN, "no such session: log in again")
        return session

    def check(self, session: Session, hvid: str) -> None:
        """Raises Refusal unless ``session`` may be used, now, over a connection that the card of hypervisor ``hvid`` opened."""
        if not session.is_open:
            raise Refusal(Reason.SESSION_UNKNOWN, "the session was closed: log in again")
        if session.expires_at <= self._clock():
            self.close(session)
            raise Refusal(Reason.SESSION_EXPIRED, "the session has ended: log in again")
        if session.hvid != hvid:
            raise Refusal(
                Reason.HYPERVISOR_MISMATCH,
                "this session belongs to another hypervisor",
                detail=f"session {session.name} of {session.hvid} over a connection of {hvid}",
            )
        try:
            self._standing.check(vmid=session.vmid, hvid=session.hvid, token_id=session.token_id)
        except Refusal:
            self.close(session)
            raise

    def close(self, session: Session) -> None:
        """Ends the session at once; its streams end with their next batch."""
        session.is_open = False
        session.scratch = None
        self._sessions.pop(session.key, None)
        self._database.execute("DELETE FROM sessions WHERE secret_hash = ?", (session.key,))
        self._count()

    def purge(self) -> None:
        """Forgets what has expired."""
        now = self._clock()
        for session in [session for session in self._sessions.values() if session.expires_at <= now]:
            self.close(session)

    def _move(self, claim: Claim) -> None:
        """The VM is on this hypervisor now, so it has sessions on no other."""
        if self.places.take(claim):
            log.info("a VM has moved", extra={"vmid": claim.vmid, "hvid": claim.hvid})
        for session in self.all():
            if session.vmid == claim.vmid and session.hvid != claim.hvid:
                self.close(session)

    def _load(self) -> None:
        now = self._clock()
        self._database.execute("DELETE FROM sessions WHERE expires_at <= ?", (now,))
        # What a full disk, or the end of this process, kept from being closed when its VM moved.
        self._database.execute(
            "DELETE FROM sessions WHERE EXISTS "
            "(SELECT 1 FROM places WHERE places.vmid = sessions.vmid AND places.hvid != sessions.hvid)"
        )
        for key, vmid, hvid, seid, token_id, operations, created_at, expires_at in self._database.execute(
            "SELECT secret_hash, vmid, hvid, seid, token_id, operations, created_at, expires_at FROM sessions"
        ):
            self._sessions[key] = Session(
                key, vmid, hvid, seid, token_id, frozenset(filter(None, operations.split(","))), created_at, expires_at
            )
        self._count()

    def _count(self) -> None:
        self._metrics.sessions.set(len(self._sessions))


def _key(secret: str) -> bytes:
    # The secret has 256 random bits: a plain hash hides it, and a lookup by hash leaks nothing about it by its time.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
