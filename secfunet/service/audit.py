"""The audit log: JSON lines, append-only, each record chained to the one before by SHA-256.

A record is one line ``{"n":…,"time":…,…,"prev":"<hash>","hash":"<hash>"}``: ``n`` counts from 1, ``prev`` is the hash of the record before
(64 zeros before the first), ``hash`` is SHA-256 over the line without its ``hash`` member. The *anchor* beside the log (``.head``) names
the last record that is certainly on disk; it outlives rotation, so that a log whose tail is missing, or that was put away, is noticed.
``audit_verify`` reads all this back. The chain has no key: who can write both files can forge both. So a daemon says the head in its
own log at every start and stop, too, for whoever collects that elsewhere.

``AuditLog`` is for a daemon, which is the one writer as long as it runs; ``AuditJournal`` for commands, several of which may run at once.
A record holds names, reasons and identifiers; never a secret, a plaintext or a token: a program's records have no field for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pwd
import threading
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal, Self

from secfunet.errors import SecFuNetError
from secfunet.service.files import open_private, write_atomically

log = logging.getLogger(__name__)

FIRST = "0" * 64
SUFFIX = len(',"hash":""}') + 64
MAX_LINE = 32768  # bytes; a record is some 300
MAX_PENDING = 10_000  # records that wait while the disk refuses
_MAX_TEXT = 256  # characters of any one field
_LOCK_PAUSE: Final = 0.02  # seconds between two attempts at the lock of a journal
_LOGIN_UID: Final = Path("/proc/self/loginuid")
_NO_LOGIN: Final = 2**32 - 1
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode

Decision = Literal["permitted", "refused", "failed", "noted"]


class AuditError(SecFuNetError):
    """Root of what an audit log raises."""


class AuditBrokenError(AuditError):
    """The log is not what the anchor says it was: somebody changed it. Nothing is added to it.

    Put the log file away (the anchor stays): the next log then continues the chain where the anchor left it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class AuditUnavailableError(AuditError):
    """A record cannot be written now, so what it tells of must not be done. ``cause``: what the system says, or None."""

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class AuditBusyError(AuditUnavailableError):
    """Another process writes this log."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: another process writes this log")


class LogAction(StrEnum):
    """What a log records of itself, whichever program writes it."""

    RECOVERED = "audit.recovered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The user of this system who acts. ``login``: as whom he logged in (the kernel keeps that over su and sudo, if the system sets it);
    ``sudo``: who used sudo, as the environment says. Root can change either.
    """

    uid: int
    user: str = ""
    login: str = ""
    sudo: str = ""

    @classmethod
    def of_this_process(cls) -> Self:
        """Whose command this is."""
        uid = os.getuid()
        login = ""
        with contextlib.suppress(OSError, ValueError):
            number = int(_LOGIN_UID.read_text(encoding="ascii"))
            login = "" if number == _NO_LOGIN else _user_name(number)
        return cls(uid=uid, user=_user_name(uid), login=login, sudo=os.environ.get("SUDO_USER", ""))


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@dataclass(frozen=True, slots=True)
class Record:
    """One decision. A program derives its own records, and its ``action`` is of an enumeration of its own; what is empty is not written.

    ``name``: of whom or what it is about; ``actor``: the user of this system who did it; ``reason``: why not, of that ``domain``
    (google.rpc.ErrorInfo); ``correlation``: an id of the writer's own making, the same in other programs' records of the same call.
    """

    action: StrEnum
    decision: Decision
    _: KW_ONLY
    correlation: str = ""
    name: str = ""
    actor: Actor | None = None
    reason: str = ""
    domain: str = ""
    detail: str = ""


@cache
def _names_of(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def fields_of(record: Any) -> dict[str, object]:
    """What of a record (or a part of one) is written: texts are cut at 256 characters, the empty is left out."""
    fields: dict[str, object] = {}
    for name in _names_of(record.__class__):
        value = getattr(record, name)
        if isinstance(value, str):
            if value:
                fields[name] = value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "…"
        elif isinstance(value, int):
            fields[name] = value
        elif value is not None:
            fields[name] = fields_of(value)
    return fields


@dataclass(frozen=True)
class Head:
    """The last record: its number and its hash."""

    n: int
    hash: str


class AuditChain:
    """The chain itself, no IO: fields in, line out."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def line(self, time: float, fields: dict[str, object]) -> bytes:
        n, previous = self.head.n + 1, self.head.hash
        body = _encode({"n": n, "time": time, **fields, "prev": previous}).encode("ascii")
        digest = hashlib.sha256(body).hexdigest()
        self.head = Head(n, digest)
        return body[:-1] + b',"hash":"' + digest.encode("ascii") + b'"}\n'


def split_line(line: bytes) -> tuple[bytes, str]:
    """The hashed body of a line (without its newline) and the hash that it claims. Raises ValueError."""
    tail = line[-SUFFIX:]
    if not tail.startswith(b',"hash":"') or not tail.endswith(b'"}'):
        raise ValueError("is no audit record")
    return line[:-SUFFIX] + b"}", tail[9:-2].decode("ascii")


def anchor_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def read_anchor(path: Path) -> Head | None:
    """The anchor of the log ``path``; None if it was never written. Raises AuditBrokenError if it is damaged."""
    try:
        raw = json.loads(anchor_path(path).read_text(encoding="ascii"))
        head = Head(int(raw["n"]), str(raw["hash"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise AuditBrokenError(anchor_path(path), "is no anchor of an audit log") from error
    return head


class AuditLog:
    """The one writer of a log (an flock sees to that). Records are written in batches, and synced every ``sync_interval`` seconds.

    Use as an async context manager. ``record`` may be called from the event loop only; ``flush`` puts what was recorded into the file
    (so that a killed process loses nothing of it), and raises what ``unavailable`` makes of the cause if that cannot be done.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float],
        sync_interval: float = 1.0,
        unavailable: Callable[[OSError | None], SecFuNetError] | None = None,
    ) -> None:
        self._path = path
        self._clock = clock
        self._unavailable = unavailable or partial(cannot_be_written, path)
        self._sync_interval = sync_interval
        self._chain = AuditChain(Head(0, FIRST))
        self._pending: list[bytes] = []
        self._written = Head(0, FIRST)
        self._anchored = Head(0, FIRST)
        self._descriptor = -1
        self._lock = -1
        self._size = 0
        self._flush_scheduled = False
        self._syncer: asyncio.Task[None] | None = None
        self._anchoring = threading.Lock()

    @property
    def head(self) -> Head:
        return self._chain.head

    async def __aenter__(self) -> AuditLog:
        self.open()
        log.info("audit log opened", extra={"records": self.head.n, "head": self.head.hash})
        self._syncer = asyncio.create_task(self._sync_at_intervals())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._syncer is not None:
            self._syncer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._syncer
        self.close()
        log.info("audit log closed", extra={"records": self.head.n, "head": self.head.hash})

    def open(self, *, patience: float = 0.0) -> None:
        """Takes the lock, repairs a last line that a crash tore, and continues the chain.

        ``patience``: seconds that another writer may have the log. Raises AuditBusyError after that, AuditBrokenError (records that the
        anchor names are missing, or the last record is not what it was), OSError.
        """
        lock_path = self._path.with_name(self._path.name + ".lock")
        self._lock = open_private(lock_path)
        until = time.monotonic() + patience
        while not _try_lock(self._lock):
            if time.monotonic() >= until:
                os.close(self._lock)
                self._lock = -1
                raise AuditBusyError(self._path)
            time.sleep(_LOCK_PAUSE)
        try:
            self._continue()
        except BaseException:
            self.abandon()
            raise

    def close(self) -> None:
        try:
            if self._descriptor >= 0:
                self.flush()
                self._sync(self._descriptor, self._written)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Lets go of the log; what was recorded and not flushed is lost."""
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1

    def reopen(self) -> None:
        """After a rotation: what was recorded goes to the old file, what comes goes to a new one of the same name, in one chain.

        If there can be no new one now, the old one is written on. Raises as ``open`` does.
        """
        self.flush()
        self._sync(self._descriptor, self._written)
        old, size = self._descriptor, self._size
        try:
            self._continue()
        except BaseException:
            if self._descriptor != old:
                os.close(self._descriptor)
            self._descriptor, self._size = old, size
            raise
        os.close(old)

    def record(self, record: Record) -> None:
        """Adds one decision; it waits in memory until it is flushed. Raises what ``unavailable`` makes if too many wait already."""
        if len(self._pending) >= MAX_PENDING:
            raise self._unavailable(None)
        self._pending.append(self._chain.line(round(self._clock(), 6), fields_of(record)))
        if not self._flush_scheduled:
            with contextlib.suppress(RuntimeError):  # no event loop: the caller flushes
                asyncio.get_running_loop().call_soon(self._flush_later)
                self._flush_scheduled = True

    def flush(self) -> None:
        """Writes what waits. Raises what ``unavailable`` makes; then nothing of it is in the file, and all of it still waits."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            if done:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
            raise self._unavailable(error) from error
        self._size += len(data)
        self._pending.clear()
        self._written = self._chain.head

    def _flush_later(self) -> None:
        self._flush_scheduled = False
        with contextlib.suppress(SecFuNetError):  # logged; whoever asks for a decision flushes and is refused
            self.flush()

    async def _sync_at_intervals(self) -> None:
        while True:
            await asyncio.sleep(self._sync_interval)
            if self._written != self._anchored:
                # A descriptor of its own: a rotation may close the other meanwhile, and a cancelled task does not stop its thread.
                try:
                    copy = os.dup(self._descriptor)
                except OSError as error:  # no descriptor is free: the next time there may be one
                    log.error("the audit log cannot be synced: %s", error)
                    continue
                await asyncio.to_thread(self._sync_copy, copy, self._written)

    def _sync_copy(self, descriptor: int, head: Head) -> None:
        try:
            self._sync(descriptor, head)
        except (SecFuNetError, OSError) as error:
            log.error("the audit log cannot be synced: %s", error)
        finally:
            os.close(descriptor)

    def _sync(self, descriptor: int, head: Head) -> None:
        os.fsync(descriptor)
        # Two syncs may meet (the periodic one; a rotation or the end): the anchor never goes back.
        with self._anchoring:
            if head.n > self._anchored.n:
                write_atomically(anchor_path(self._path), _encode({"n": head.n, "hash": head.hash}).encode("ascii"))
                self._anchored = head

    def _continue(self) -> None:
        anchor = read_anchor(self._path)
        self._descriptor = open_private(self._path, os.O_RDWR | os.O_APPEND)
        self._size = os.fstat(self._descriptor).st_size
        start = max(0, self._size - 2 * MAX_LINE)
        tail = os.pread(self._descriptor, self._size - start, start)
        whole = tail.rfind(b"\n") + 1
        torn = len(tail) - whole
        if torn and not whole and start:
            raise AuditBrokenError(self._path, "has no record at its end")
        head = self._last_record(tail[:whole])
        if anchor is not None:
            if head is None and self._size == torn:
                head = self._rotated_head(anchor)
            elif head is None or head.n < anchor.n:
                raise AuditBrokenError(self._path, f"ends before record {anchor.n}, which was written")
            elif head.n == anchor.n and head.hash != anchor.hash:
                raise AuditBrokenError(self._path, f"record {anchor.n} is not the one that was written")
        self._chain = AuditChain(head or Head(0, FIRST))
        self._written = self._chain.head
        self._anchored = anchor or Head(0, FIRST)
        if torn:
            os.ftruncate(self._descriptor, self._size - torn)
            self._size -= torn
            self.record(
                Record(LogAction.RECOVERED, "noted", detail=f"a crash left {torn} bytes of an unfinished record")
            )
            self.flush()

    def _rotated_head(self, anchor: Head) -> Head:
        """Where a new, empty file continues: the anchor, or what a killed daemon wrote behind it into a file that was then rotated."""
        heads = [anchor]
        for path in self._path.parent.glob(f"{self._path.name}?*"):
            if path.is_file() and not path.name.endswith((".head", ".lock", ".gz")):
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - 2 * MAX_LINE))
                    tail = file.read()
                with contextlib.suppress(AuditBrokenError):
                    heads.append(self._last_record(tail[: tail.rfind(b"\n") + 1]) or anchor)
        return max(heads, key=lambda head: head.n)

    def _last_record(self, tail: bytes) -> Head | None:
        if not tail:
            return None
        last = tail[:-1].rsplit(b"\n", 1)[-1]
        try:
            body, claimed = split_line(last)
            number = json.loads(body)["n"]
            if hashlib.sha256(body).hexdigest() != claimed or not isinstance(number, int):
                raise ValueError("changed")
        except (ValueError, KeyError, TypeError) as error:
            raise AuditBrokenError(self._path, "its last record was changed") from error
        return Head(number, claimed)


def cannot_be_written(path: Path, cause: OSError | None) -> AuditUnavailableError:
    """What a log raises unless its program has words of its own for it. ``cause`` None: too many records wait."""
    why = "too many records wait" if cause is None else cause.strerror or str(cause)
    return AuditUnavailableError(
        f"the audit log {path} cannot be written ({why}): nothing is done that is not on record", cause
    )


class AuditJournal:
    """The log of a program whose commands come and go: each record is on disk, and the lock let go of again, when ``append`` returns."""

    PATIENCE: Final = 10.0
    """Seconds that others may have the log."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, patience: float = PATIENCE) -> None:
        self.path = path
        self._clock = clock
        self._patience = patience

    def probe(self) -> None:
        """Whether a record could be added now. Raises as ``append`` does."""
        chain = AuditLog(self.path, clock=self._clock)
        try:
            chain.open(patience=self._patience)
        except OSError as error:
            raise cannot_be_written(self.path, error) from error
        chain.abandon()

    def append(self, *records: Record) -> None:
        """Raises AuditUnavailableError, and AuditBrokenError if somebody changed the log; nothing is recorded then."""
        chain = AuditLog(self.path, clock=self._clock)
        try:
            chain.open(patience=self._patience)
            try:
                for record in records:
                    chain.record(record)
                chain.flush()
            except BaseException:
                chain.abandon()
                raise
            chain.close()
        except OSError as error:
            raise cannot_be_written(self.path, error) from error


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
