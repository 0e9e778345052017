"""What a ``check`` command finds, of every program: one line a finding, one JSON, one pair of exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import typer

from secfunet.service.cli import ExitCode, tell


class Weight(StrEnum):
    """What a finding means."""

    OK = "ok"
    WARNING = "warning"  # it works, and somebody should look
    AWAY = "away"  # it is not there now, and may come
    WRONG = "wrong"  # it will not work before somebody corrects it


@dataclass(frozen=True)
class Finding:
    """``what``: a key of the settings, a file, or a card."""

    what: str
    weight: Weight = Weight.OK
    message: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.message}" if self.message else self.what


def report(found: Sequence[Finding], *, as_json: bool) -> None:
    """Prints them; raises typer.Exit with 78 if something must be corrected, 69 if something is not there now."""
    tell(
        "\n".join(f"{one.weight.value:<8} {one}" for one in found),
        [{"what": one.what, "state": one.weight.value, "message": one.message} for one in found],
        as_json=as_json,
    )
    weights = {one.weight for one in found}
    if Weight.WRONG in weights:
        raise typer.Exit(ExitCode.CONFIG)
    if Weight.AWAY in weights:
        raise typer.Exit(ExitCode.UNAVAILABLE)
