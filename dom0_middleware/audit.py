"""The audit log: JSON lines, append-only, each record chained to the one before by SHA-256.

A record is one line ``{"n":…,"time":…,…,"prev":"<hash>","hash":"<hash>"}``: ``n`` counts from 1, ``prev`` is the hash of the record before
(64 zeros before the first), ``hash`` is SHA-256 over the line without its ``hash`` member. The *anchor* beside the log (``.head``) names
the last record that is certainly on disk; it outlives rotation, so that a log whose tail is missing, or that was put away, is noticed.
``audit_verify`` reads all this back. The chain has no key: who can write both files can forge both. So the head also goes to the daemon's
own log at every start and stop, for whoever collects that elsewhere.

A record holds names, reasons and identifiers; never a secret, a digest, a plaintext or a token: ``record`` takes no field for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dom0_middleware.errors import MiddlewareError, Reason, Unavailable
from secfunet.service.files import write_atomically

log = logging.getLogger(__name__)

FIRST = "0" * 64
SUFFIX = len(',"hash":""}') + 64
MAX_LINE = 32768  # bytes; a record is some 300
MAX_PENDING = 10_000  # records that wait while the disk refuses
_MAX_TEXT = 256  # characters of any one field
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode

Decision = Literal["permitted", "refused", "failed", "noted"]


class AuditBrokenError(MiddlewareError):
    """The log is not what the anchor says it was: somebody changed it. The daemon does not start on it.

    Put the log file away (the anchor stays): the next log then continues the chain where the anchor left it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(Reason.AUDIT_UNAVAILABLE, f"{path}: {problem}")
        self.path = path


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
    (so that a killed process loses nothing of it), and raises Unavailable if that cannot be done.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float], sync_interval: float = 1.0) -> None:
        self._path = path
        self._clock = clock
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
        self._syncer = asyncio.create_task(self._sync_at_intervals())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._syncer is not None:
            self._syncer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._syncer
        self.close()

    def open(self) -> None:
        """Takes the lock, repairs a last line that a crash tore, and continues the chain.

        Raises AuditBrokenError: another writer, records missing that the anchor names, or a last record that is not what it was.
        """
        lock_path = self._path.with_name(self._path.name + ".lock")
        self._lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = -1
            raise AuditBrokenError(self._path, "another process writes this log") from None
        try:
            self._continue()
        except BaseException:
            self._release()
            raise
        log.info("audit log opened", extra={"records": self.head.n, "head": self.head.hash})

    def close(self) -> None:
        try:
            if self._descriptor >= 0:
                self.flush()
                self._sync(self._descriptor, self._written)
                log.info("audit log closed", extra={"records": self.head.n, "head": self.head.hash})
        finally:
            self._release()

    def reopen(self) -> None:
        """After a rotation: what was recorded goes to the old file, what comes goes to a new one of the same name, in one chain."""
        self.flush()
        self._sync(self._descriptor, self._written)
        os.close(self._descriptor)
        self._descriptor = -1
        self._continue()

    def record(
        self,
        action: str,
        decision: Decision,
        *,
        correlation: str = "",
        vm: str = "",
        name: str = "",
        caller: str = "",
        reason: str = "",
        operation: str = "",
        scheme: str = "",
        request: str = "",
        batch: int | None = None,
        detail: str = "",
    ) -> None:
        """One decision. ``vm``: the domain's UUID; ``caller``: an orchestrator's name; ``request``: a request id in hexadecimal."""
        if len(self._pending) >= MAX_PENDING:
            raise _unavailable()
        fields: dict[str, object] = {"action": action, "decision": decision}
        for key, text in (
            ("correlation", correlation),
            ("vm", vm),
            ("name", name),
            ("caller", caller),
            ("reason", reason),
            ("operation", operation),
            ("scheme", scheme),
            ("request", request),
            ("detail", detail),
        ):
            if text:
                fields[key] = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
        if batch is not None:
            fields["batch"] = batch
        self._pending.append(self._chain.line(round(self._clock(), 6), fields))
        if not self._flush_scheduled:
            with contextlib.suppress(RuntimeError):  # no event loop: the caller flushes
                asyncio.get_running_loop().call_soon(self._flush_later)
                self._flush_scheduled = True

    def flush(self) -> None:
        """Writes what waits. Raises Unavailable (AUDIT_UNAVAILABLE); then nothing of it is in the file, and all of it still waits."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            log.error("the audit log cannot be written: %s", error)
            if done:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
            raise _unavailable() from error
        self._size += len(data)
        self._pending.clear()
        self._written = self._chain.head

    def _flush_later(self) -> None:
        self._flush_scheduled = False
        with contextlib.suppress(Unavailable):  # logged; whoever asks for a decision flushes and is refused
            self.flush()

    async def _sync_at_intervals(self) -> None:
        while True:
            await asyncio.sleep(self._sync_interval)
            if self._written != self._anchored:
                # A descriptor of its own: a rotation may close the other meanwhile, and a cancelled task does not stop its thread.
                await asyncio.to_thread(self._sync_copy, os.dup(self._descriptor), self._written)

    def _sync_copy(self, descriptor: int, head: Head) -> None:
        try:
            self._sync(descriptor, head)
        except OSError as error:
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
        self._descriptor = os.open(
            self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
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
            self.record("audit.recovered", "noted", detail=f"a crash left {torn} bytes of an unfinished record")
            self.flush()

    def _rotated_head(self, anchor: Head) -> Head:
        """Where a new, empty file continues: the anchor, or what a killed daemon wrote behind it into a file that was then rotated."""
        heads = [anchor]
        for path in self._path.parent.glob(f"{self._path.name}?*"):
            if not path.name.endswith((".head", ".lock", ".gz")):
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

    def _release(self) -> None:
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1


def _unavailable() -> Unavailable:
    return Unavailable(Reason.AUDIT_UNAVAILABLE, "the decision cannot be recorded, so nothing is done", retry_after=5.0)
