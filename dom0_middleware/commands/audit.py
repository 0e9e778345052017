"""``secure-middleware audit``: is the log what the daemon wrote?"""

from __future__ import annotations

import typer

from dom0_middleware.commands.options import DEFAULT_CONFIG, Config
from dom0_middleware.settings import MiddlewareSettings
from secfunet.service.audit_report import (
    AsJsonOption,
    FilesOption,
    FollowOption,
    LastOption,
    show_records,
    verify_and_report,
)
from secfunet.service.settings import load_settings

app = typer.Typer(help="The audit log.", no_args_is_help=True)


@app.command("verify")
def verify_log(file: FilesOption = None, config: Config = DEFAULT_CONFIG, as_json: AsJsonOption = False) -> None:
    """Find changed, missing and reordered records, and a tail that is gone."""
    verify_and_report(file, lambda: load_settings(MiddlewareSettings, config).audit_file, as_json=as_json)


@app.command("show")
def show(
    file: FilesOption = None,
    last: LastOption = 20,
    follow: FollowOption = False,
    as_json: AsJsonOption = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Print the last records; with --json as they stand in the log, one object a line."""
    show_records(
        file, lambda: load_settings(MiddlewareSettings, config).audit_file, last=last, follow=follow, as_json=as_json
    )
