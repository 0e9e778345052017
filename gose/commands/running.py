"""``gose serve``, ``gose check`` and ``gose status``: the grid, whether it would work, and how it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import time
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Final

import typer

from gose.authority import AuthorityFolder
from gose.commands.options import CONFIG, ConfigOption
from gose.registry import Registry, open_registry
from gose.settings import GoseSettings
from secfunet.card.readers import show_readers
from secfunet.service.cli import JsonOption
from secfunet.service.daemon import run_daemon, survive_hangup
from secfunet.service.findings import report
from secfunet.service.logs import configure_logs
from secfunet.service.settings import load_settings

app = typer.Typer()

_TOP_OF_SCREEN: Final = "\033[H\033[2J"  # ECMA-48: cursor home, erase all


@app.command()
def status(
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="The cards, again and again until Ctrl-C (with --json: an object a line).")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks of --watch.")] = 2.0,
    config: ConfigOption = CONFIG,
) -> None:
    """Show the running grid (cards, queues, sessions), who is enrolled, which tokens are out, and what was revoked."""
    from gose.overview import take_overview
    from gose.overview.machine import as_json as for_machine
    from gose.overview.text import as_text

    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority)
    with open_registry(settings.database) as registry:
        if watch:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(_watch(settings, authority, registry, interval=interval, as_json=as_json))
            return
        overview = asyncio.run(take_overview(settings, authority, registry, now=time.time()))
    typer.echo(json.dumps(for_machine(overview), indent=2) if as_json else as_text(overview))


async def _watch(
    settings: GoseSettings, authority: AuthorityFolder, registry: Registry, *, interval: float, as_json: bool
) -> None:
    """Until it is cancelled."""
    from gose.overview import take_overview
    from gose.overview.machine import with_pulse
    from gose.overview.pulse import pulse_of
    from gose.overview.watch import as_short_text

    before = None
    while True:
        overview = await take_overview(settings, authority, registry, now=time.time())
        pulse = pulse_of(before, overview.running)
        before = overview.running
        if as_json:
            typer.echo(json.dumps(with_pulse(overview, pulse)))
        elif sys.stdout.isatty():
            picture = as_short_text(overview, pulse, lines=shutil.get_terminal_size().lines)
            typer.echo(f"{_TOP_OF_SCREEN}{picture}")
        else:
            typer.echo(as_short_text(overview, pulse) + "\n")
        sys.stdout.flush()
        await asyncio.sleep(interval)


app.command("readers")(show_readers)


@app.command()
def check(
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Say whether a grid with these settings would work: files, certificates, names, addresses, and each card with its PIN.

    A card that a running grid has is not touched. Exit code 78: something must be corrected; 69: a card is not there, or not used.
    """
    from gose.checks import look

    settings = load_settings(GoseSettings, config)
    for element in settings.secure_elements:
        element.ask_for_pin(f"{element.seid} ({element.place})")
    report(asyncio.run(look(settings, now=time.time())), as_json=as_json)


@app.command()
def serve(config: ConfigOption = CONFIG) -> None:
    """Run the grid until SIGTERM: service provider, OpenID provider, and the slots of its cards. SIGHUP reads the settings again."""
    survive_hangup()
    # Late: an administrator's commands need not wait for the web server's imports.
    from gose.server import GridService

    settings = load_settings(GoseSettings, config)
    configure_logs(settings.log_level)

    for element in settings.secure_elements:
        element.ask_for_pin(f"{element.seid} ({element.place})")

    async def make_service() -> AbstractAsyncContextManager[object]:
        return GridService(settings, read_again=lambda: load_settings(GoseSettings, config))

    run_daemon(make_service, descriptors=settings.descriptors)
