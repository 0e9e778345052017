"""Reads an audit log back: finds changed, missing and reordered records, and a tail that is gone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from secfunet.service.audit import FIRST, MAX_LINE, AuditBrokenError, Head, read_anchor, split_line

MAX_PROBLEMS = 100


class ProblemKind(StrEnum):
    CHANGED = "changed"
    MISSING = "missing"
    REORDERED = "reordered"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Problem:
    """``line`` counts from 1; ``n`` is the number of the record, where it can be told."""

    kind: ProblemKind
    file: Path
    line: int
    n: int | None
    message: str


@dataclass
class Verdict:
    """``first`` and ``head``: the range that was read. ``torn``: bytes of an unfinished last line (a crash; repaired at the next start)."""

    records: int = 0
    first: int | None = None
    head: Head | None = None
    torn: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems


def rotated_files(path: Path) -> list[Path]:
    """The log ``path`` and what rotation left of it (``path``.1, ``path``-20260101, …), oldest record first."""
    files = [
        file
        for file in path.parent.glob(f"{path.name}*")
        if file.is_file() and not file.name.endswith((".head", ".lock", ".gz"))
    ]
    return sorted(files, key=lambda file: (_first_number(file), file == path))


def verify(files: list[Path], *, anchor_of: Path | None) -> Verdict:
    """Reads ``files`` as one chain; its end is compared with the anchor of the log ``anchor_of`` (None: the end is taken as it is).

    A chain that begins after record 1 is taken as the rest of a longer one. Raises AuditBrokenError if the anchor is damaged.
    """
    # The anchor first: what it names is in the file already, though the daemon goes on writing.
    anchor = read_anchor(anchor_of) if anchor_of is not None else None
    return _Verification(anchor).run(files)


class _Verification:
    def __init__(self, anchor: Head | None) -> None:
        self._anchor = anchor
        self._verdict = Verdict()
        self._seen_anchor = False

    def run(self, files: list[Path]) -> Verdict:
        for index, file in enumerate(files):
            for number, line in enumerate(_lines(file), start=1):
                if not line.endswith(b"\n"):
                    self._unfinished(file, number, line, last=index == len(files) - 1)
                elif len(self._verdict.problems) < MAX_PROBLEMS:
                    self._line(file, number, line[:-1])
        if files:
            self._end(files[-1])
        return self._verdict

    def _line(self, file: Path, number: int, line: bytes) -> None:
        try:
            body, claimed = split_line(line)
            record = json.loads(body)
            n, previous = record["n"], record["prev"]
            if type(n) is not int or type(previous) is not str:
                raise ValueError("wrong types")
        except (ValueError, KeyError, TypeError, RecursionError):
            self._problem(ProblemKind.UNREADABLE, file, number, None, "is no audit record")
            return
        verdict = self._verdict
        head = verdict.head
        if hashlib.sha256(body).hexdigest() != claimed:
            self._problem(ProblemKind.CHANGED, file, number, n, f"record {n} was changed")
        elif head is None:
            if n == 1 and previous != FIRST:
                self._problem(ProblemKind.CHANGED, file, number, n, "record 1 does not begin a chain")
        elif n <= head.n:
            self._problem(ProblemKind.REORDERED, file, number, n, f"record {n} stands after record {head.n}")
        elif n > head.n + 1:
            gap = f"record {head.n + 1}" if n == head.n + 2 else f"records {head.n + 1} to {n - 1}"
            self._problem(ProblemKind.MISSING, file, number, n, f"{gap} missing before record {n}")
        elif previous != head.hash:
            self._problem(ProblemKind.CHANGED, file, number, n, f"record {n} does not follow the record before it")
        if self._anchor is not None and n == self._anchor.n:
            self._seen_anchor = True
            if claimed != self._anchor.hash:
                self._problem(ProblemKind.CHANGED, file, number, n, f"record {n} is not the one that the anchor names")
        verdict.records += 1
        verdict.first = n if verdict.first is None else verdict.first
        if head is None or n > head.n:
            verdict.head = Head(n, claimed)

    def _unfinished(self, file: Path, number: int, line: bytes, *, last: bool) -> None:
        if last and len(line) < MAX_LINE:
            self._verdict.torn = len(line)
        else:
            self._problem(ProblemKind.UNREADABLE, file, number, None, "is no audit record")

    def _end(self, file: Path) -> None:
        anchor, head = self._anchor, self._verdict.head
        if anchor is None or self._seen_anchor:
            return
        if head is None and self._verdict.torn == 0 and anchor.n > 0:
            message = f"no record at all, but {anchor.n} were written"
        elif head is None or head.n < anchor.n:
            message = f"ends at record {head.n if head else 0}, but record {anchor.n} was written"
        else:
            message = f"record {anchor.n}, which the anchor names, is missing"
        self._problem(ProblemKind.TRUNCATED, file, 0, None, message)

    def _problem(self, kind: ProblemKind, file: Path, line: int, n: int | None, message: str) -> None:
        self._verdict.problems.append(Problem(kind, file, line, n, message))


def _lines(file: Path) -> Iterator[bytes]:
    """The lines with their newlines; a line that is longer than any record comes in pieces."""
    with file.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            yield line


def _first_number(file: Path) -> int:
    try:
        with file.open("rb") as stream:
            return int(json.loads(stream.readline(MAX_LINE))["n"])
    except (ValueError, KeyError, TypeError):
        # Empty (a new file after a rotation): last. Anything else unreadable: it is found when it is read.
        return 1 << 62


__all__ = ["AuditBrokenError", "Problem", "ProblemKind", "Verdict", "rotated_files", "verify"]
