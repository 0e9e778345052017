"""SQLite as the grid uses it: write-ahead log, foreign keys, one connection a thread, short transactions."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gose.errors import GoseError, Reason, Refusal
from secfunet.service.files import make_private, private_folder, refuse_planted_link
from secfunet.service.flood_log import FloodLog

_flood = FloodLog(logging.getLogger(__name__))

BUSY_TIMEOUT = 5.0  # seconds that a writer waits for another one
SERVING_BUSY_TIMEOUT = 0.25  # likewise, in the event loop of a running grid, where everybody waits with it


class StateError(GoseError):
    """A file of the grid's state cannot be used."""

    def __init__(self, path: Path, cause: sqlite3.Error) -> None:
        super().__init__(f"{path} cannot be used: {cause}")
        self.path = path


def open_database(path: Path, schema: str, *, busy_timeout: float = BUSY_TIMEOUT) -> sqlite3.Connection:
    """Opens (makes, mode 0600) the database and applies ``schema`` (only CREATE ... IF NOT EXISTS).

    Autocommit: a statement is durable against the death of this process when it returns, and against a power cut after the next
    checkpoint (WAL with synchronous=NORMAL). Raises StateError, OSError.
    """
    private_folder(path.parent)
    # SQLite would make the file with the umask's mode; its -wal and -shm files take over the mode of the file. A file that is there
    # must not be opened here: closing it would drop every lock that this process's other connections hold on it (POSIX), and another
    # process, thinking itself the last one, would then take away their log (https://sqlite.org/howtocorrupt.html, 2.2).
    make_private(path)
    refuse_planted_link(path)
    try:
        database = sqlite3.connect(
            path, timeout=busy_timeout, isolation_level=None, cached_statements=256, check_same_thread=False
        )
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute("PRAGMA foreign_keys=ON")
            database.executescript(schema)
        except BaseException:
            database.close()
            raise
    except sqlite3.Error as error:
        raise StateError(path, error) from error
    return database


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All of it or nothing. Raises sqlite3.Error."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        # After some errors (a full disk) SQLite has rolled back by itself.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def state_unavailable(error: sqlite3.Error) -> Refusal:
    """What a caller of a running grid is told when its state cannot be read or written (disk full, file locked); logs why."""
    _flood.error("state", "the state cannot be used", {"cause": str(error)})
    return Refusal(Reason.STATE_UNAVAILABLE, "the grid cannot use its state now", retry_after=1.0, detail=str(error))
