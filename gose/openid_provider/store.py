"""Associations and used nonces in SQLite: a restart of the grid neither breaks a login on its way nor lets an assertion be used twice."""

from __future__ import annotations

import sqlite3

from secfunet.openid.association import Association, AssociationKind, AssociationType

SCHEMA = """
CREATE TABLE IF NOT EXISTS associations (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    handle TEXT NOT NULL,
    type TEXT NOT NULL,
    secret BLOB NOT NULL,
    expires_at REAL NOT NULL,
    UNIQUE (kind, endpoint, handle)
);
CREATE TABLE IF NOT EXISTS nonces (
    endpoint TEXT NOT NULL,
    nonce TEXT NOT NULL,
    keep_until REAL NOT NULL,
    PRIMARY KEY (endpoint, nonce)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS nonces_by_time ON nonces (keep_until);
"""


class SqliteOpenIdStore:
    """secfunet.openid.store.OpenIdStore. The file is the grid's own (mode 0600): MAC keys lie in it as they are."""

    def __init__(
        self, database: sqlite3.Connection, *, max_associations: int = 10_000, max_nonces: int = 1_000_000
    ) -> None:
        self._database = database
        self._max_associations = max_associations
        self._max_nonces = max_nonces
        database.executescript(SCHEMA)

    def save_association(self, association: Association) -> None:
        """See OpenIdStore."""
        kind = association.kind.value
        self._database.execute(
            "INSERT OR REPLACE INTO associations (kind, endpoint, handle, type, secret, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
            (
                kind,
                association.endpoint,
                association.handle,
                association.type.value,
                association.secret,
                association.expires_at,
            ),
        )
        self._database.execute(
            "DELETE FROM associations WHERE kind = ? AND sequence <="
            " (SELECT sequence FROM associations WHERE kind = ? ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
            (kind, kind, self._max_associations),
        )

    def find_association(
        self, kind: AssociationKind, endpoint: str, handle: str | None, now: float
    ) -> Association | None:
        """See OpenIdStore."""
        row = self._database.execute(
            "SELECT handle, type, secret, expires_at FROM associations WHERE kind = ? AND endpoint = ?"
            " AND (? IS NULL OR handle = ?) AND expires_at > ? ORDER BY expires_at DESC LIMIT 1",
            (kind.value, endpoint, handle, handle, now),
        ).fetchone()
        if row is None:
            return None
        found_handle, type_name, secret, expires_at = row
        return Association(kind, endpoint, found_handle, AssociationType(type_name), secret, expires_at)

    def remove_association(self, kind: AssociationKind, endpoint: str, handle: str) -> bool:
        """See OpenIdStore."""
        cursor = self._database.execute(
            "DELETE FROM associations WHERE kind = ? AND endpoint = ? AND handle = ?", (kind.value, endpoint, handle)
        )
        return cursor.rowcount == 1

    def use_nonce(self, endpoint: str, nonce: str, keep_until: float, now: float) -> bool:
        """See OpenIdStore."""
        self._database.execute("DELETE FROM nonces WHERE keep_until < ?", (now,))
        (known,) = self._database.execute("SELECT COUNT(*) FROM nonces").fetchone()
        if known >= self._max_nonces:
            return False
        cursor = self._database.execute("INSERT OR IGNORE INTO nonces VALUES (?, ?, ?)", (endpoint, nonce, keep_until))
        return cursor.rowcount == 1

    def purge(self, now: float) -> None:
        """Forgets what has expired."""
        self._database.execute("DELETE FROM associations WHERE expires_at <= ?", (now,))
        self._database.execute("DELETE FROM nonces WHERE keep_until < ?", (now,))
