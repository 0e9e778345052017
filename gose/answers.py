"""Answers that were given: a retry with the same request id gets the first answer, not a second execution.

What is kept is the container, sealed as it went out: no result lies here in the clear, and the same hypervisor's card opens it again.
An answer is kept for one VM on one hypervisor, because a container opens for no other. Bounded in time and in size; the oldest go first.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gose.state import SERVING_BUSY_TIMEOUT, open_database, transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS containers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kept_until REAL NOT NULL,
    container BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS containers_by_time ON containers (kept_until);
CREATE TABLE IF NOT EXISTS answers (
    scope BLOB NOT NULL,
    request_id BLOB NOT NULL,
    request_digest BLOB NOT NULL,
    container INTEGER NOT NULL,
    PRIMARY KEY (scope, request_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_by_container ON answers (container);
"""

_PURGE_STEP = 256  # containers a transaction: a writer waits no longer than that takes


@dataclass(frozen=True)
class Question:
    """What an answer answers: ``request_id`` (16 bytes) and the digest of the operation (secfunet.operation.request_digest)."""

    request_id: bytes
    request_digest: bytes


def scope_of(vmid: str, hvid: str) -> bytes:
    """The 16 bytes under which the answers of one VM on one hypervisor are kept."""
    return hashlib.sha256(f"{vmid}\n{hvid}".encode()).digest()[:16]


class AnswerStore:
    """SQLite, written before the answer goes out; ``maintain`` is called now and then, from any thread."""

    def __init__(self, path: Path, *, keep: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._keep = keep
        self._max_bytes = max_bytes
        self._clock = clock
        self._database = open_database(path, SCHEMA, busy_timeout=SERVING_BUSY_TIMEOUT)
        # Checkpoints (with their fsync) happen in ``maintain``, not under a caller's feet.
        self._database.execute("PRAGMA wal_autocheckpoint=0")
        # The keeper works through a connection of its own, and may run in another thread.
        self._keeper = open_database(path, "")
        self._keeping = threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        with self._keeping:
            self._keeper.close()
        self._database.close()

    def find(self, scope: bytes, questions: Sequence[Question]) -> tuple[dict[bytes, bytes], set[bytes]]:
        """The containers that answer some of ``questions``, by request id; and the ids that were used for another operation before."""
        marks = ",".join("?" * len(questions))
        rows = self._database.execute(
            "SELECT answers.request_id, request_digest, containers.container FROM answers"  # noqa: S608 - only question marks are put in
            " JOIN containers ON containers.id = answers.container"
            f" WHERE scope = ? AND kept_until > ? AND request_id IN ({marks})",
            (scope, self._clock(), *(question.request_id for question in questions)),
        ).fetchall()
        found: dict[bytes, bytes] = {}
        reused: set[bytes] = set()
        if rows:
            asked = {question.request_id: question.request_digest for question in questions}
            for request_id, request_digest, container in rows:
                if hmac.compare_digest(asked[request_id], request_digest):
                    found[request_id] = container
                else:
                    reused.add(request_id)
        return found, reused

    def keep(self, scope: bytes, questions: Sequence[Question], container: bytes) -> None:
        """Keeps ``container`` as the answer to each of ``questions``."""
        with transaction(self._database) as database:
            cursor = database.execute(
                "INSERT INTO containers (kept_until, container) VALUES (?, ?)", (self._clock() + self._keep, container)
            )
            database.executemany(
                # An expired answer to the same id may still be there.
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                [(scope, question.request_id, question.request_digest, cursor.lastrowid) for question in questions],
            )

    def maintain(self) -> None:
        """Forgets what is too old, and the oldest of what is too much; writes the log back into the file."""
        with self._keeping:
            now = self._clock()
            while self._forget("kept_until <= ?", (now,)):
                pass
            # AUTOINCREMENT: ids grow with time.
            while self._size() > self._max_bytes and self._forget("1", ()):
                pass
            self._keeper.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _size(self) -> int:
        """Bytes in use, an upper bound of what the containers take."""
        (pages,) = self._keeper.execute("PRAGMA page_count").fetchone()
        (free,) = self._keeper.execute("PRAGMA freelist_count").fetchone()
        (page_size,) = self._keeper.execute("PRAGMA page_size").fetchone()
        size: int = (pages - free) * page_size
        return size

    def _forget(self, condition: str, values: tuple[float, ...]) -> int:
        with transaction(self._keeper) as keeper:
            old = [
                row[0]
                for row in keeper.execute(
                    f"SELECT id FROM containers WHERE {condition} ORDER BY id LIMIT {_PURGE_STEP}",  # noqa: S608 - our own text
                    values,
                )
            ]
            keeper.executemany("DELETE FROM answers WHERE container = ?", [(one,) for one in old])
            keeper.executemany("DELETE FROM containers WHERE id = ?", [(one,) for one in old])
        return len(old)
