"""The tables, and from their rows to records."""

from __future__ import annotations

import sqlite3
from typing import Final

from gose.registry.records import Identity, Revocation, RevocationKind, State, Token
from secfunet.identity import Role

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS identities (
  thumbprint TEXT PRIMARY KEY,
  role TEXT NOT NULL CHECK (role IN ('hypervisor', 'vm', 'server')),
  name TEXT NOT NULL,
  seid TEXT,
  certificate BLOB NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('pending', 'active', 'replaced')),
  recorded_at REAL NOT NULL,
  expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS one_active_name ON identities (role, name) WHERE state = 'active';
CREATE UNIQUE INDEX IF NOT EXISTS one_pending_name ON identities (role, name) WHERE state = 'pending';
CREATE UNIQUE INDEX IF NOT EXISTS one_active_seid ON identities (seid) WHERE state = 'active' AND seid IS NOT NULL;
CREATE VIEW IF NOT EXISTS hypervisors AS SELECT * FROM identities WHERE role = 'hypervisor';
CREATE VIEW IF NOT EXISTS vms AS SELECT * FROM identities WHERE role = 'vm';
CREATE VIEW IF NOT EXISTS servers AS SELECT * FROM identities WHERE role = 'server';
CREATE TABLE IF NOT EXISTS tokens (
  jti TEXT PRIMARY KEY,
  vmid TEXT NOT NULL,
  hvid TEXT NOT NULL,
  operations TEXT NOT NULL,
  issued_at REAL NOT NULL,
  expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tokens_by_expiry ON tokens (expires_at);
CREATE TABLE IF NOT EXISTS bindings (
  vmid TEXT PRIMARY KEY,
  hvid TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reservations (
  seid TEXT PRIMARY KEY,
  until REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS user_tokens (
  counter INTEGER PRIMARY KEY,
  recipient TEXT NOT NULL,
  name TEXT NOT NULL,
  issued_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS revocations (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL CHECK (kind IN ('token', 'vm', 'hypervisor', 'server')),
  value TEXT NOT NULL,
  name TEXT NOT NULL,
  revoked_at REAL NOT NULL,
  UNIQUE (kind, value)
) STRICT;
"""

SELECT_IDENTITY: Final = (
    "SELECT i.role, i.name, i.thumbprint, i.certificate, i.seid, i.state, i.recorded_at, i.expires_at, r.revoked_at "
    "FROM identities AS i LEFT JOIN revocations AS r ON r.kind = i.role AND r.value = i.thumbprint "
)
SELECT_TOKEN: Final = (
    "SELECT t.jti, t.vmid, t.hvid, t.operations, t.issued_at, t.expires_at, r.revoked_at "  # noqa: S105 - SQL, no password
    "FROM tokens AS t LEFT JOIN revocations AS r ON r.kind = 'token' AND r.value = t.jti "
)
SELECT_REVOCATION: Final = "SELECT sequence, kind, value, name, revoked_at FROM revocations "


def identity_of(row: tuple[object, ...]) -> Identity:
    """A row of SELECT_IDENTITY. Raises sqlite3.DataError, as the others do, for a value that is none."""
    role, name, thumbprint, certificate, seid, state, recorded_at, expires_at, revoked_at = row
    return Identity(
        role=Role(str(role)),
        name=str(name),
        thumbprint=str(thumbprint),
        certificate=_blob(certificate),
        seid=None if seid is None else str(seid),
        state=State(str(state)),
        recorded_at=_time(recorded_at),
        expires_at=_time(expires_at),
        revoked_at=None if revoked_at is None else _time(revoked_at),
    )


def token_of(row: tuple[object, ...]) -> Token:
    """A row of SELECT_TOKEN."""
    jti, vmid, hvid, operations, issued_at, expires_at, revoked_at = row
    return Token(
        jti=str(jti),
        vmid=str(vmid),
        hvid=str(hvid),
        operations=frozenset(str(operations).split()),
        issued_at=_time(issued_at),
        expires_at=_time(expires_at),
        revoked_at=None if revoked_at is None else _time(revoked_at),
    )


def revocation_of(row: tuple[object, ...]) -> Revocation:
    """A row of SELECT_REVOCATION."""
    sequence, kind, value, name, revoked_at = row
    return Revocation(int(str(sequence)), RevocationKind(str(kind)), str(value), str(name), _time(revoked_at))


def _time(value: object) -> float:
    if not isinstance(value, float | int):
        raise sqlite3.DataError("a time in the registry is no number")
    return float(value)


def _blob(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise sqlite3.DataError("a certificate in the registry is no blob")
    return value
