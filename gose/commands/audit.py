"""``gose audit``: is the log what the authority wrote?"""

from __future__ import annotations

import typer

from gose.authority.ledger import FILE
from gose.commands.options import CONFIG, ConfigOption
from gose.settings import GoseSettings
from secfunet.service.audit_report import (
    AsJsonOption,
    FilesOption,
    FollowOption,
    LastOption,
    show_records,
    verify_and_report,
)
from secfunet.service.settings import load_settings

app = typer.Typer(help="The audit log of the authority.", no_args_is_help=True)


@app.command("verify")
def verify_log(file: FilesOption = None, as_json: AsJsonOption = False, config: ConfigOption = CONFIG) -> None:
    """Find changed, missing and reordered records, and a tail that is gone."""
    verify_and_report(file, lambda: load_settings(GoseSettings, config).state / FILE, as_json=as_json)


@app.command("show")
def show(
    file: FilesOption = None,
    last: LastOption = 20,
    follow: FollowOption = False,
    as_json: AsJsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Print the last records; with --json as they stand in the log, one object a line."""
    show_records(
        file, lambda: load_settings(GoseSettings, config).state / FILE, last=last, follow=follow, as_json=as_json
    )
