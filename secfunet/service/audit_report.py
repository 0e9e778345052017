"""``audit verify`` and ``audit show`` of every program that keeps a log: the same reading, the same words, the same exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import typer

from secfunet.service.audit_verify import Verdict, rotated_files, verify
from secfunet.service.cli import ExitCode, JsonOption
from secfunet.service.flood_log import excerpt
from secfunet.service.tables import moment

FilesOption = Annotated[
    list[Path] | None,
    typer.Option("--file", help="A log file (repeatable, oldest first); default: the log of the settings."),
]
AsJsonOption = JsonOption


def verify_and_report(files: list[Path] | None, log: Callable[[], Path], *, as_json: bool) -> None:
    """Reads ``files`` (None: the log that ``log`` names, and what rotation left of it) and says what it found.

    Raises typer.Exit (DATA) if the log is not what was written; OSError if there is none, which is another thing.
    """
    if files:
        # The last one given may be the live log: then its anchor lies beside it.
        verdict = verify(files, anchor_of=files[-1])
    else:
        path = log()
        verdict = verify(rotated_files(path) or [path], anchor_of=path)
    if as_json:
        typer.echo(json.dumps(_for_machine(verdict), indent=2))
    else:
        _for_person(verdict)
    if not verdict.sound:
        raise typer.Exit(ExitCode.DATA)


def _for_machine(verdict: Verdict) -> dict[str, object]:
    head = verdict.head
    problems = [
        {"kind": problem.kind, "file": str(problem.file), "line": problem.line, "message": problem.message}
        for problem in verdict.problems
    ]
    facts = {"sound": verdict.sound, "records": verdict.records, "first": verdict.first, "torn": verdict.torn}
    last = {"last": head.n, "head": head.hash} if head else {}
    return {**facts, **last, "problems": problems}


def _for_person(verdict: Verdict) -> None:
    head = verdict.head
    for problem in verdict.problems:
        where = f"{problem.file}:{problem.line}" if problem.line else str(problem.file)
        typer.echo(f"{problem.kind}: {where}: {problem.message}", err=True)
    if verdict.torn:
        typer.echo(f"the last line is unfinished ({verdict.torn} bytes): it is repaired before the next record")
    if verdict.sound:
        span = f"{verdict.first} to {head.n}, head {head.hash}" if head else "none"
        typer.echo(f"sound: {verdict.records} records ({span})")


LastOption = Annotated[int, typer.Option("--last", min=1, max=1_000_000, help="How many records, from the end.")]
FollowOption = Annotated[bool, typer.Option("--follow", help="Go on with records as they come, until Ctrl-C.")]
_LOOK: Final = 0.5  # seconds between two looks at a log that is followed
_MAX_SHOWN: Final = 300  # characters of one field; the log has 256 of it
_SHOWN: Final = ("decision", "name", "reason", "detail")


def show_records(files: list[Path] | None, log: Callable[[], Path], *, last: int, follow: bool, as_json: bool) -> None:
    """Prints the last records (with ``as_json`` the lines of the log as they are), and those to come. They are not verified."""
    path = files[-1] if files else log()
    lines: deque[bytes] = deque(maxlen=last)
    # Read once and kept open: nothing is left out between what was there and what comes.
    live = path.open("rb") if follow else None
    for file in files or rotated_files(path) or [path]:
        if live is not None and file == path:
            lines.extend(_whole_lines(live))
        else:
            with file.open("rb") as content:
                lines.extend(_whole_lines(content))
    for line in lines:
        typer.echo(_shown(line, as_json=as_json))
    if live is not None:
        with contextlib.suppress(KeyboardInterrupt):
            for line in _to_come(path, live):
                typer.echo(_shown(line, as_json=as_json))


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """From where ``file`` is; it is left behind the last newline."""
    while (line := file.readline()).endswith(b"\n"):
        yield line
    file.seek(-len(line), os.SEEK_CUR)


def _to_come(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines that are written behind the place ``file`` is at, over every rotation."""
    try:
        unfinished = b""
        while True:
            unfinished += file.read(1 << 20)
            *whole, unfinished = unfinished.split(b"\n")
            yield from whole
            with contextlib.suppress(FileNotFoundError):
                if not whole and path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    # What the writer put into the old file before it made the new one.
                    yield from (unfinished + file.read()).split(b"\n")[:-1]
                    file.close()
                    file, unfinished = path.open("rb"), b""
                    continue
            if not whole:
                time.sleep(_LOOK)
    finally:
        file.close()


def _shown(line: bytes, *, as_json: bool) -> str:
    text = line.decode("ascii", "replace").rstrip("\n")
    if as_json:
        return text
    try:
        record = json.loads(text)
        # Who is recorded may have chosen some of it: nothing of it acts on a terminal.
        facts = [excerpt(record[key], _MAX_SHOWN) for key in _SHOWN if record.get(key)]
        action = excerpt(record.get("action", "-"))
        return f"{record['n']:>6}  {moment(record['time'])}  {action:20} {'  '.join(facts)}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"not a record: {excerpt(text)}"
