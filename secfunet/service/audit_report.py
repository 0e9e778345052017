"""``audit verify`` of every program that keeps a log: the same reading, the same words, the same exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from secfunet.service.audit_verify import Verdict, rotated_files, verify
from secfunet.service.cli import ExitCode, JsonOption

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
