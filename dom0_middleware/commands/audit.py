"""``secure-middleware audit``: is the log what the daemon wrote?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dom0_middleware.audit_verify import Verdict, rotated_files, verify
from dom0_middleware.commands.options import DEFAULT_CONFIG, AsJson, BadInput, Config
from dom0_middleware.settings import MiddlewareSettings
from secfunet.service.cli import ExitCode
from secfunet.service.settings import load_settings

app = typer.Typer(help="The audit log.", no_args_is_help=True)


@app.command("verify")
def verify_log(
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="A log file (repeatable, oldest first); default: the log of the settings."),
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Find changed, missing and reordered records, and a tail that is gone."""
    if file:
        # The last one given may be the live log: then its anchor lies beside it.
        missing = [path for path in file if not path.is_file()]
        if missing:
            raise BadInput(f"{missing[0]} cannot be read")
        verdict = verify(file, anchor_of=file[-1])
    else:
        log = load_settings(MiddlewareSettings, config).audit_file
        verdict = verify(rotated_files(log) or [log], anchor_of=log)
    _show_verdict(verdict, as_json=as_json)
    if not verdict.sound:
        raise typer.Exit(ExitCode.DATA)


def _show_verdict(verdict: Verdict, *, as_json: bool) -> None:
    head = verdict.head
    if as_json:
        problems = [
            {"kind": problem.kind, "file": str(problem.file), "line": problem.line, "message": problem.message}
            for problem in verdict.problems
        ]
        facts = {"sound": verdict.sound, "records": verdict.records, "first": verdict.first, "torn": verdict.torn}
        last = {"last": head.n, "head": head.hash} if head else {}
        typer.echo(json.dumps({**facts, **last, "problems": problems}, indent=2))
        return
    for problem in verdict.problems:
        where = f"{problem.file}:{problem.line}" if problem.line else str(problem.file)
        typer.echo(f"{problem.kind}: {where}: {problem.message}", err=True)
    if verdict.torn:
        typer.echo(f"the last line is unfinished ({verdict.torn} bytes): the daemon repairs it when it starts")
    if verdict.sound:
        span = f"{verdict.first} to {head.n}, head {head.hash}" if head else "none"
        typer.echo(f"sound: {verdict.records} records ({span})")
