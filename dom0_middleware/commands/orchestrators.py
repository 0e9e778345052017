"""``secure-middleware orchestrator``: who may command the daemon. A running daemon takes each change at once."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dom0_middleware.commands.options import DEFAULT_CONFIG, AsJson, Config
from dom0_middleware.errors import Refused
from dom0_middleware.orchestrator_authority import OrchestratorAuthority
from dom0_middleware.settings import MiddlewareSettings
from secfunet.service.audit import Actor, AuditJournal, Record
from secfunet.service.cli import tell
from secfunet.service.settings import load_settings
from secfunet.service.tables import columns, moment

app = typer.Typer(help="Who may command the daemon.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="1 to 64 characters of [A-Za-z0-9._-].")]

JOURNAL = "orchestrators.jsonl"  # in the state folder; 'secure-middleware audit verify --file' verifies it


class _Action(StrEnum):
    ADD = "orchestrator.add"
    ROTATE = "orchestrator.rotate"
    REMOVE = "orchestrator.remove"


@app.command("add")
def add(name: Name, config: Config = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Make a key and a certificate for a NAME that has none."""
    settings, authority = _opened(config)
    with _recorded(settings, authority, _Action.ADD, name):
        path = authority.add(name)
    tell(f"made {path} and its key beside it", _made(authority, name, path), as_json=as_json)
    if name not in settings.orchestrators.allowed:
        typer.echo(f"note: '{name}' is not in orchestrators.allowed of {config}: its calls are refused", err=True)


@app.command("rotate")
def rotate(name: Name, config: Config = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Make a new key and certificate for NAME; the ones before end at once."""
    settings, authority = _opened(config)
    with _recorded(settings, authority, _Action.ROTATE, name):
        path = authority.rotate(name)
    said = f"made {path} and its key beside it; the earlier certificate has ended"
    tell(said, _made(authority, name, path), as_json=as_json)


@app.command("remove")
def remove(name: Name, config: Config = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """End NAME's certificate, at once and for good."""
    settings, authority = _opened(config)
    with _recorded(settings, authority, _Action.REMOVE, name):
        authority.remove(name)
    tell(f"the certificate of '{name}' has ended", {"name": name}, as_json=as_json)


@app.command("list")
def list_all(config: Config = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Show each orchestrator's certificate, until when it is good, and when it was last used."""
    settings, authority = _opened(config)
    found = authority.list()
    allowed = frozenset(settings.orchestrators.allowed)
    if as_json:
        rows = [
            {
                "name": each.name,
                "allowed": each.name in allowed,
                "certificate": each.thumbprint,
                "serial": format(each.serial, "x"),
                "until": int(each.not_after),
                "last_seen": None if each.last_seen is None else int(each.last_seen),
            }
            for each in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    lines = [
        (
            each.name,
            "yes" if each.name in allowed else "no",
            moment(each.not_after),
            "never" if each.last_seen is None else moment(each.last_seen),
            each.thumbprint,
            format(each.serial, "x"),
        )
        for each in found
    ]
    typer.echo(columns(("NAME", "ALLOWED", "UNTIL", "LAST SEEN", "CERTIFICATE", "SERIAL"), lines))


def _made(authority: OrchestratorAuthority, name: str, path: Path) -> dict[str, object]:
    found = next(each for each in authority.list() if each.name == name)
    return {"name": name, "certificate_file": str(path), "certificate": found.thumbprint, "until": int(found.not_after)}


def _opened(config: Path) -> tuple[MiddlewareSettings, OrchestratorAuthority]:
    settings = load_settings(MiddlewareSettings, config)
    return settings, OrchestratorAuthority.load(settings.state, clock=time.time)


@contextlib.contextmanager
def _recorded(
    settings: MiddlewareSettings, authority: OrchestratorAuthority, action: _Action, name: str
) -> Iterator[None]:
    """On file before it is done, and how it went; in a log of its own, as the daemon's has one writer."""
    journal = AuditJournal(settings.state / JOURNAL)
    record = Record(action, "permitted", name=name[:64], actor=Actor.of_this_process())
    journal.append(replace(record, detail=_certificate(authority, name, "is on file")))
    try:
        yield
    except Refused as error:
        journal.append(replace(record, decision="refused", reason=str(error.reason), detail=str(error)))
        raise
    journal.append(replace(record, decision="noted", detail=_certificate(authority, name, "is now")))


def _certificate(authority: OrchestratorAuthority, name: str, what: str) -> str:
    found = next((each for each in authority.list() if each.name == name), None)
    return "" if found is None else f"certificate {found.thumbprint} {what}"
