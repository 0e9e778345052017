"""The file, and every question that is asked of it."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from gose.registry.records import Identity, NotEnrolledError, RegistryError, Revocation, RevocationKind, Token
from gose.registry.rows import (
    SCHEMA,
    SELECT_IDENTITY,
    SELECT_REVOCATION,
    SELECT_TOKEN,
    identity_of,
    revocation_of,
    token_of,
)
from gose.state import open_database, transaction
from secfunet.identity import Role

_TICK: Final = 1e-6  # seconds between two tokens of a VM, at least
TOKENS_KEPT: Final = 30 * 86400.0
"""How long an expired token (and its revocation) stays in the registry, seconds: for whoever asks afterwards what was issued."""


class Registry:
    """The registry in the file ``path`` (made if need be, mode 0600). Threads may share one; several processes may each have one.

    Methods raise sqlite3.Error if the file cannot be used, and what they name.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._database = open_database(path, SCHEMA)
        # A revocation must survive a power cut once it was acknowledged.
        self._database.execute("PRAGMA synchronous=FULL")
        self._lock = threading.RLock()
        self._clock = clock

    def close(self) -> None:
        """Gives the file back."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- identities: questions

    def find(self, role: Role, thumbprint: str) -> Identity | None:
        """The active identity with that role and thumbprint, revoked or not; None if there is none."""
        return self._identity("WHERE i.thumbprint = ? AND i.role = ? AND i.state = 'active'", thumbprint, role.value)

    def find_vm(self, vmid: str) -> Identity | None:
        """See find. Its ``seid`` is the card that holds the VM's key."""
        return self.find(Role.VM, vmid)

    def find_hypervisor(self, hvid: str) -> Identity | None:
        """See find."""
        return self.find(Role.HYPERVISOR, hvid)

    def find_server(self, thumbprint: str) -> Identity | None:
        """See find. Its ``seid`` is the card that serves."""
        return self.find(Role.SERVER, thumbprint)

    def named(self, role: Role, name: str) -> Identity:
        """The active identity of that name. Raises NotEnrolledError."""
        found = self._identity("WHERE i.role = ? AND i.name = ? AND i.state = 'active'", role.value, name)
        if found is None:
            raise NotEnrolledError(role.value, name)
        return found

    def identities(self, role: Role) -> tuple[Identity, ...]:
        """All active identities of that role, by name."""
        return self._identities("WHERE i.role = ? AND i.state = 'active' ORDER BY i.name", role.value)

    def name_of(self, thumbprint: str) -> str | None:
        """Whose certificate that is or was; None if it was never issued here."""
        row = self._one("SELECT name FROM identities WHERE thumbprint = ?", thumbprint)
        return None if row is None else str(row[0])

    def pending(self, role: Role, name: str) -> Identity | None:
        """The identity of that name whose enrolment has begun and not ended; None if there is none."""
        return self._identity("WHERE i.role = ? AND i.name = ? AND i.state = 'pending'", role.value, name)

    def in_secure_element(self, seid: str) -> Identity | None:
        """The active identity whose key that card holds, or None."""
        return self._identity("WHERE i.seid = ? AND i.state = 'active'", seid)

    # --- identities: enrolment

    def begin_enrolment(
        self, role: Role, name: str, thumbprint: str, certificate: bytes, seid: str | None, expires_at: float
    ) -> None:
        """Records a certificate that was issued and is about to be loaded into a card.

        It takes the place of an earlier pending one of that name.
        """
        with self._transaction() as database:
            database.execute(
                "UPDATE identities SET state = 'replaced' WHERE role = ? AND name = ? AND state = 'pending'",
                (role.value, name),
            )
            database.execute(
                "INSERT INTO identities (thumbprint, role, name, seid, certificate, state, recorded_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?, 'pending', ?, ?)",
                (thumbprint, role.value, name, seid, certificate, self._clock(), expires_at),
            )

    def finish_enrolment(self, thumbprint: str) -> Identity:
        """Makes a pending identity the active one of its name, and of its secure element; those before it are replaced.

        Raises NotEnrolledError.
        """
        with self._transaction() as database:
            row = database.execute(
                "SELECT role, name, seid FROM identities WHERE thumbprint = ? AND state = 'pending'", (thumbprint,)
            ).fetchone()
            if row is None:
                raise NotEnrolledError("pending enrolment", thumbprint)
            role, name, seid = row
            database.execute(
                "UPDATE identities SET state = 'replaced' WHERE state = 'active' AND ((role = ? AND name = ?) OR seid = ?)",
                (role, name, seid),
            )
            database.execute("UPDATE identities SET state = 'active' WHERE thumbprint = ?", (thumbprint,))
            active = database.execute(SELECT_IDENTITY + "WHERE i.thumbprint = ?", (thumbprint,)).fetchone()
        return identity_of(active)

    # --- bindings, and what an administrator does to a card that is in service

    def binding(self, vmid: str) -> str | None:
        """The HVID that the card of that VM was bound to, or None."""
        row = self._one("SELECT hvid FROM bindings WHERE vmid = ?", vmid)
        return None if row is None else str(row[0])

    def record_binding(self, vmid: str, hvid: str | None) -> None:
        """Records to whom a VM's card was bound; None: to nobody any more."""
        with self._transaction() as database:
            database.execute("DELETE FROM bindings WHERE vmid = ?", (vmid,))
            if hvid is not None:
                database.execute("INSERT INTO bindings (vmid, hvid) VALUES (?, ?)", (vmid, hvid))

    @contextlib.contextmanager
    def reserved(self, seid: str, *, seconds: float) -> Iterator[None]:
        """A running grid lets go of that card for as long as the context lasts, ``seconds`` at most."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO reservations (seid, until) VALUES (?, ?)", (seid, self._clock() + seconds)
            )
        try:
            yield
        finally:
            with self._transaction() as database:
                database.execute("DELETE FROM reservations WHERE seid = ?", (seid,))

    def is_reserved(self, seid: str) -> bool:
        """Whether an administrator wants the card for himself now."""
        return self._one("SELECT 1 FROM reservations WHERE seid = ? AND until > ?", seid, self._clock()) is not None

    # --- tokens

    def record_token(
        self, jti: str, vmid: str, hvid: str, operations: frozenset[str], issued_at: float, expires_at: float
    ) -> None:
        """Records a token before it is handed out; forgets those that ended long ago (TOKENS_KEPT).

        Of two tokens of a VM the one that was recorded later is the newer one on record, whatever the clock did in between.
        """
        with self._transaction() as database:
            old = self._clock() - TOKENS_KEPT
            database.execute(
                "DELETE FROM revocations WHERE kind = 'token' AND value IN (SELECT jti FROM tokens WHERE expires_at < ?)",
                (old,),
            )
            database.execute("DELETE FROM tokens WHERE expires_at < ?", (old,))
            (newest,) = database.execute("SELECT MAX(issued_at) FROM tokens WHERE vmid = ?", (vmid,)).fetchone()
            if newest is not None:
                issued_at = max(issued_at, newest + _TICK)
            database.execute(
                "INSERT INTO tokens (jti, vmid, hvid, operations, issued_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
                (jti, vmid, hvid, " ".join(sorted(operations)), issued_at, expires_at),
            )

    def token(self, jti: str) -> Token | None:
        """What was issued under that jti, or None."""
        row = self._one(SELECT_TOKEN + "WHERE t.jti = ?", jti)
        return None if row is None else token_of(row)

    def tokens(self, *, unexpired_at: float | None = None) -> tuple[Token, ...]:
        """All tokens on record, or those that have not expired at that time; the newest first."""
        since = float("-inf") if unexpired_at is None else unexpired_at
        return tuple(
            map(token_of, self._all(SELECT_TOKEN + "WHERE t.expires_at > ? ORDER BY t.issued_at DESC, t.jti", since))
        )

    def record_user_token(self, recipient: str, name: str, issued_at: float) -> int:
        """Records a user's token before it is handed out; returns its counter, which only grows.

        It is the time in milliseconds where the clock allows it: so a registry that was restored from a backup does not give out again
        what cards have seen.
        """
        with self._transaction() as database:
            (last,) = database.execute("SELECT COALESCE(MAX(counter), 0) FROM user_tokens").fetchone()
            counter = max(int(last) + 1, int(issued_at * 1000))
            database.execute(
                "INSERT INTO user_tokens (counter, recipient, name, issued_at) VALUES (?, ?, ?, ?)",
                (counter, recipient, name, issued_at),
            )
        return counter

    # --- revocations

    def revoke_token(self, jti: str) -> Revocation:
        """Revokes the token (again: nothing changes). Raises NotEnrolledError if it was not issued here."""
        if self.token(jti) is None:
            raise NotEnrolledError("token", jti)
        return self._revoke(RevocationKind.TOKEN, jti, jti)

    def revoke_identity(self, role: Role, name: str) -> tuple[Revocation, ...]:
        """Revokes every certificate that this name ever had (again: nothing changes); with it fall its tokens and sessions.

        Raises NotEnrolledError.
        """
        found = self._identities("WHERE i.role = ? AND i.name = ? ORDER BY i.recorded_at", role.value, name)
        if not found:
            raise NotEnrolledError(role.value, name)
        return tuple(self._revoke(RevocationKind(role.value), identity.thumbprint, name) for identity in found)

    def is_token_revoked(self, jti: str) -> bool:
        """Whether that jti was revoked; fits TokenVerifier.verify."""
        return self._one("SELECT 1 FROM revocations WHERE kind = 'token' AND value = ?", jti) is not None

    def is_identity_revoked(self, role: Role, thumbprint: str) -> bool:
        """Whether that certificate was revoked."""
        return self._one("SELECT 1 FROM revocations WHERE kind = ? AND value = ?", role.value, thumbprint) is not None

    def revocation_of(self, *, vmid: str, hvid: str, jti: str) -> Revocation | None:
        """The first revocation that touches a session of this VM, hypervisor and token, or None.

        One question, cheap enough to be asked before every operation.
        """
        row = self._one(
            SELECT_REVOCATION
            + "WHERE (kind = 'token' AND value = ?) OR (kind = 'vm' AND value = ?) OR (kind = 'hypervisor' AND value = ?) "
            "ORDER BY sequence LIMIT 1",
            jti,
            vmid,
            hvid,
        )
        return None if row is None else revocation_of(row)

    def revocations(self, *, after: int = 0) -> tuple[Revocation, ...]:
        """Revocations with a sequence number above ``after``, oldest first: what a running grid has to act upon since it last looked."""
        return tuple(map(revocation_of, self._all(SELECT_REVOCATION + "WHERE sequence > ? ORDER BY sequence", after)))

    def last_revocation(self) -> int:
        """The highest sequence number, 0 if nothing was ever revoked; a cheap question."""
        row = self._one("SELECT COALESCE(MAX(sequence), 0) FROM revocations")
        return int(str(row[0])) if row else 0

    # --- SQLite

    def _revoke(self, kind: RevocationKind, value: str, name: str) -> Revocation:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO revocations (kind, value, name, revoked_at) VALUES (?, ?, ?, ?) ON CONFLICT (kind, value) DO NOTHING",
                (kind.value, value, name, self._clock()),
            )
            row = database.execute(SELECT_REVOCATION + "WHERE kind = ? AND value = ?", (kind.value, value)).fetchone()
        return revocation_of(row)

    def _identity(self, where: str, *parameters: object) -> Identity | None:
        row = self._one(SELECT_IDENTITY + where, *parameters)
        return None if row is None else identity_of(row)

    def _identities(self, where: str, *parameters: object) -> tuple[Identity, ...]:
        return tuple(map(identity_of, self._all(SELECT_IDENTITY + where, *parameters)))

    def _one(self, query: str, *parameters: object) -> tuple[object, ...] | None:
        with self._lock:
            row: tuple[object, ...] | None = self._database.execute(query, parameters).fetchone()
        return row

    def _all(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        with self._lock:
            return self._database.execute(query, parameters).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._database) as database:
            yield database


@contextlib.contextmanager
def open_registry(path: Path) -> Iterator[Registry]:
    """The registry of a grid for a command; what SQLite says of it becomes a sentence: RegistryError."""
    try:
        with Registry(path) as registry:
            yield registry
    except sqlite3.Error as error:
        raise RegistryError(f"{path} cannot be used: {error}") from error
