"""What must outlive the daemon: which VMID is bound to which domain, and what holds for each domain's present run.

SQLite, mode 0600, in the state folder. Every method is one transaction, on disk when it returns (WAL, synchronous=FULL): a revocation
survives a power cut. Calls are rare (life cycle, enrolment) and short, so they run in the event loop.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable
from secfunet.service.files import open_private

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS vms (
  uuid TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  vmid TEXT NOT NULL UNIQUE,
  vm_certificate BLOB NOT NULL,
  vm_auth_token TEXT NOT NULL,
  memory_mib INTEGER NOT NULL,
  vcpus INTEGER NOT NULL,
  revoked INTEGER NOT NULL DEFAULT 0,
  created_at REAL NOT NULL,
  address TEXT NOT NULL DEFAULT '',
  arriving INTEGER NOT NULL DEFAULT 0,
  leaving TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS vms_address ON vms (address) WHERE address != '';
CREATE TABLE IF NOT EXISTS runs (
  uuid TEXT PRIMARY KEY REFERENCES vms (uuid) ON DELETE CASCADE,
  domain_id INTEGER,
  secret_hash BLOB NOT NULL,
  attempts_left INTEGER NOT NULL,
  secret_used INTEGER NOT NULL DEFAULT 0,
  serials TEXT NOT NULL DEFAULT '{}',
  secret_key BLOB NOT NULL DEFAULT x'',
  agent_key BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE TABLE IF NOT EXISTS host (one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL) STRICT;
"""
# From each earlier version to the next one.
_UPGRADES = {
    1: """
ALTER TABLE vms ADD COLUMN address TEXT NOT NULL DEFAULT '';
ALTER TABLE vms ADD COLUMN arriving INTEGER NOT NULL DEFAULT 0;
""",
    2: "ALTER TABLE vms ADD COLUMN leaving TEXT NOT NULL DEFAULT '';",
    3: "ALTER TABLE runs ADD COLUMN secret_key BLOB NOT NULL DEFAULT x'';",
    4: "ALTER TABLE runs ADD COLUMN agent_key BLOB NOT NULL DEFAULT x'';",
}
_VERSION = 5


_SELECT_RUNS = "SELECT uuid, domain_id, attempts_left, secret_used, secret_hash=x'', serials, agent_key FROM runs"
_UNIQUE = {"vms.vmid": "VMID", "vms.address": "address", "vms_address": "address", "vms.uuid": "UUID"}


class StateError(MiddlewareError):
    """The state file cannot be used."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(Reason.INTERNAL, f"{path}: {problem}")
        self.path = path


@dataclass(frozen=True)
class VmRecord:
    """A VM that an orchestrator created: the binding of a domain (UUID) to a VMID."""

    uuid: str
    name: str
    vmid: str
    vm_certificate: bytes
    # A bearer statement, though worthless without the hypervisor's card: kept out of logs.
    vm_auth_token: str = field(repr=False)
    memory_mib: int
    vcpus: int
    revoked: bool
    created_at: float
    # IP address, "" if none was given; one VM's only.
    address: str = ""
    # Its domain is to come from another host, or has gone there: this host defines and starts none.
    arriving: bool = False
    # The destination that its domain is being sent to; "" if it is not.
    leaving: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One run of a domain, from StartVm until it stops. ``domain_id`` None: it has not booted yet.

    ``secret_used``: the join secret belongs to one key. ``secret_forgotten``: it is worth nothing any more, to that key neither.
    ``serials``: the agent's current certificates, serial number -> end of life (UTC seconds). ``agent_key``: SHA-256 of the key
    (SubjectPublicKeyInfo) that they are for, empty before the first.
    """

    uuid: str
    domain_id: int | None
    attempts_left: int
    secret_used: bool
    secret_forgotten: bool
    serials: Mapping[int, float]
    agent_key: bytes = b""


class StateStore:
    """The file ``path``; made if it does not exist. Raises StateError if it is no state file of this version."""

    def __init__(self, path: Path) -> None:
        # Made before SQLite opens it, so that it never has another mode.
        descriptor = open_private(path)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if not 0 <= version <= _VERSION:
                raise StateError(path, f"has version {version}, this program knows {_VERSION}")
            upgrades = [_UPGRADES[known] for known in range(version, _VERSION)] if version else []
            self._db.executescript(f"BEGIN;{''.join(upgrades)}{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;")
        except sqlite3.DatabaseError as error:
            raise StateError(path, f"is no state file: {error}") from error

    def close(self) -> None:
        self._db.close()

    def require_writable(self) -> None:
        """Raises Unavailable (STATE_UNAVAILABLE) if the disk takes nothing now."""
        self._execute("UPDATE host SET boot=boot")

    def _execute(self, statement: str, values: Sequence[str | bytes | int | float] = ()) -> sqlite3.Cursor:
        """Raises Unavailable (STATE_UNAVAILABLE) if the disk does not take it."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            log.error("the state file cannot be used: %s", error)
            raise Unavailable(
                Reason.STATE_UNAVAILABLE, "the middleware cannot write its state, so nothing is done", retry_after=5.0
            ) from error

    # VMs

    def add_vm(self, record: VmRecord) -> None:
        """Raises Refused (VM_EXISTS) if the name, the UUID or the VMID is bound already."""
        try:
            self._execute(
                "INSERT INTO vms VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    record.uuid,
                    record.name,
                    record.vmid,
                    record.vm_certificate,
                    record.vm_auth_token,
                    record.memory_mib,
                    record.vcpus,
                    int(record.revoked),
                    record.created_at,
                    record.address,
                    int(record.arriving),
                    record.leaving,
                ),
            )
        except sqlite3.IntegrityError as error:
            taken = next((word for column, word in _UNIQUE.items() if column in str(error)), "name")
            raise Refused(Reason.VM_EXISTS, f"this {taken} is bound to another VM") from None

    def vm(self, uuid: str) -> VmRecord:
        """Raises Refused (VM_UNKNOWN)."""
        record = self.find_vm(uuid)
        if record is None:
            raise Refused(Reason.VM_UNKNOWN, "no such VM")
        return record

    def find_vm(self, uuid: str) -> VmRecord | None:
        """The same, None if there is none."""
        row = self._execute("SELECT * FROM vms WHERE uuid=?", (uuid,)).fetchone()
        return None if row is None else _vm(row)

    def vms(self) -> tuple[VmRecord, ...]:
        """All, by name."""
        return tuple(_vm(row) for row in self._execute("SELECT * FROM vms ORDER BY name"))

    def set_token(self, uuid: str, vm_auth_token: str) -> None:
        """Raises Refused (VM_UNKNOWN, VM_REVOKED): also if that came while the caller waited for something."""
        done = self._execute("UPDATE vms SET vm_auth_token=? WHERE uuid=? AND revoked=0", (vm_auth_token, uuid))
        if done.rowcount != 1:
            self.vm(uuid)
            raise Refused(Reason.VM_REVOKED, "this VM was revoked on this hypervisor; no token helps")

    def set_leaving(self, uuid: str, destination: str) -> None:
        """Before the domain is sent: if this daemon ends meanwhile, it has to look how that went."""
        self._execute("UPDATE vms SET leaving=? WHERE uuid=?", (destination, uuid))

    def set_here(self, uuid: str) -> None:
        """The domain is this host's."""
        self._execute("UPDATE vms SET leaving='', arriving=0 WHERE uuid=?", (uuid,))

    def set_away(self, uuid: str) -> None:
        """The domain is another host's. The token is forgotten: should it come back, it needs a new one."""
        self._execute("UPDATE vms SET leaving='', arriving=1, vm_auth_token='' WHERE uuid=?", (uuid,))

    def revoke(self, uuid: str) -> None:
        """For good: there is no way back but a new VM. The token is forgotten with it."""
        self._execute("UPDATE vms SET revoked=1, vm_auth_token='' WHERE uuid=?", (uuid,))

    def delete_vm(self, uuid: str) -> None:
        self._execute("DELETE FROM vms WHERE uuid=?", (uuid,))

    # Runs

    def begin_run(self, uuid: str, *, secret_hash: bytes, attempts: int) -> None:
        """Forgets the run before it, with its certificates and its secret."""
        self._execute(
            "INSERT OR REPLACE INTO runs (uuid, secret_hash, attempts_left) VALUES (?,?,?)",
            (uuid, secret_hash, attempts),
        )

    def end_runs_before(self, boot: str) -> None:
        """Ends every run of an earlier boot of this host: the number of a domain counts anew from there, so it says nothing any more."""
        row = self._execute("SELECT boot FROM host").fetchone()
        if row is None or row[0] != boot:
            # In this order: a crash in between ends them again.
            self._execute("DELETE FROM runs")
            self._execute("INSERT OR REPLACE INTO host VALUES (1, ?)", (boot,))

    def set_domain_id(self, uuid: str, domain_id: int) -> None:
        self._execute("UPDATE runs SET domain_id=? WHERE uuid=?", (domain_id, uuid))

    def set_serials(self, uuid: str, serials: Mapping[int, float], agent_key: bytes) -> None:
        encoded = json.dumps({format(serial, "x"): end for serial, end in serials.items()})
        self._execute("UPDATE runs SET serials=?, agent_key=? WHERE uuid=?", (encoded, agent_key, uuid))

    def invite(self, uuid: str, *, secret_hash: bytes, attempts: int) -> None:
        """Another join secret in the same run: what it had of secrets, certificates and keys before is forgotten with it."""
        self._execute(
            "UPDATE runs SET secret_hash=?, attempts_left=?, secret_used=0, secret_key=x'', serials='{}', agent_key=x''"
            " WHERE uuid=?",
            (secret_hash, attempts, uuid),
        )

    def end_run(self, uuid: str) -> None:
        self._execute("DELETE FROM runs WHERE uuid=?", (uuid,))

    def run(self, uuid: str) -> RunRecord | None:
        row = self._execute(f"{_SELECT_RUNS} WHERE uuid=?", (uuid,)).fetchone()
        return _run(row) if row else None

    def runs(self) -> tuple[RunRecord, ...]:
        return tuple(_run(row) for row in self._execute(_SELECT_RUNS))

    # Join secrets: each step is one atomic statement, so two callers cannot both pass it.

    def take_attempt(self, uuid: str) -> bytes | None:
        """Uses up one attempt before anything is compared; the secret's hash, or None if no attempt is left or it is forgotten."""
        row = self._execute(
            "UPDATE runs SET attempts_left=attempts_left-1 WHERE uuid=? AND attempts_left>0 AND secret_hash!=x''"
            " RETURNING secret_hash",
            (uuid,),
        ).fetchone()
        return bytes(row[0]) if row else None

    def use_secret(self, uuid: str, secret_hash: bytes, key: bytes, *, attempts: int) -> bool:
        """True for callers with the first ``key`` (a hash of it) only, which has ``attempts`` more, until the secret is forgotten."""
        done = self._execute(
            "UPDATE runs SET attempts_left=CASE secret_used WHEN 0 THEN ? ELSE attempts_left END, secret_used=1, secret_key=?"
            " WHERE uuid=? AND secret_hash=? AND (secret_used=0 OR secret_key=?)",
            (attempts, key, uuid, secret_hash, key),
        )
        return done.rowcount == 1

    def forget_secret(self, uuid: str) -> None:
        self._execute("UPDATE runs SET secret_hash=x'', secret_key=x'' WHERE uuid=?", (uuid,))


def _vm(row: tuple[object, ...]) -> VmRecord:
    uuid, name, vmid, certificate, token, memory, vcpus, revoked, created, address, arriving, leaving = row
    return VmRecord(
        uuid=str(uuid),
        name=str(name),
        vmid=str(vmid),
        vm_certificate=bytes(certificate),  # type: ignore[call-overload] # a BLOB column of a STRICT table
        vm_auth_token=str(token),
        memory_mib=int(str(memory)),
        vcpus=int(str(vcpus)),
        revoked=bool(revoked),
        created_at=float(str(created)),
        address=str(address),
        arriving=bool(arriving),
        leaving=str(leaving),
    )


def _run(row: tuple[object, ...]) -> RunRecord:
    uuid, domain_id, attempts, used, forgotten, serials, agent_key = row
    return RunRecord(
        uuid=str(uuid),
        domain_id=None if domain_id is None else int(str(domain_id)),
        attempts_left=int(str(attempts)),
        secret_used=bool(used),
        secret_forgotten=bool(forgotten),
        serials={int(serial, 16): float(end) for serial, end in json.loads(str(serials)).items()},
        agent_key=bytes(agent_key),  # type: ignore[call-overload] # a BLOB column of a STRICT table
    )
