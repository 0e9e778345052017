"""``secure-middleware``: the daemon of a dom0, and the commands that use a running one.

========  =======================================================================
exit code  meaning
========  =======================================================================
0         done; a verified log or a checked policy is sound
1         the operation failed; the message says why
2         wrong arguments
65        the input is not what it should be; the audit log was changed
69        the daemon cannot be reached, or something it needs is not there now
77        not permitted
78        the settings or the policy cannot be used
========  =======================================================================
"""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated

import typer

from dom0_middleware.cloud_init.user_data import CloudInitError
from dom0_middleware.commands import audit, orchestrators, state, vms
from dom0_middleware.commands.calls import AmbiguousVm, UnknownVm
from dom0_middleware.commands.options import DEFAULT_CONFIG, BadInput, Config
from dom0_middleware.errors import MiddlewareError, SettingUnusable, Unavailable
from dom0_middleware.orchestrator_client import CallInvalid, CallRefused, DaemonUnavailable, NoCredentials
from dom0_middleware.policy import PolicyFile
from dom0_middleware.settings import MiddlewareSettings
from secfunet.card.errors import CardError
from secfunet.card.readers import show_readers
from secfunet.service.audit import AuditBrokenError, AuditBusyError
from secfunet.service.cli import VERSION_HELP, ExitCode, JsonOption, application, print_version, run, tell
from secfunet.service.daemon import run_daemon, survive_hangup
from secfunet.service.logs import configure_logs
from secfunet.service.settings import SettingsError, load_settings

DESCRIPTORS = 16384  # some 150 for each guest that takes all that one guest can (docs/operations.md, Bounds)
log = logging.getLogger(__name__)

app = application("The Secure Middleware: runs in dom0, between the agents of VMs and the grid that holds their keys.")
policy_app = typer.Typer(help="The policy.", no_args_is_help=True)
app.add_typer(vms.app, name="vm")
app.add_typer(orchestrators.app, name="orchestrator")
app.add_typer(audit.app, name="audit")
app.add_typer(policy_app, name="policy")


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version("secure-middleware"), is_eager=True, help=VERSION_HELP)
    ] = False,
) -> None:
    """Runs before every command."""


@app.command()
def init(config: Config = DEFAULT_CONFIG) -> None:
    """Make what is missing: settings, policy, the two authorities of dom0, and the first orchestrator's certificate."""
    from dom0_middleware.initialise import NEXT_STEPS, initialise

    made = initialise(config)
    for path in made:
        typer.echo(f"made {path}")
    policy = load_settings(MiddlewareSettings, config).policy
    if policy in made:
        typer.echo(NEXT_STEPS.format(config=config, policy=policy))


@app.command()
def serve(config: Config = DEFAULT_CONFIG) -> None:
    """Run the daemon until SIGTERM. SIGHUP reads policy, orchestrators.allowed and destinations again, and reopens the audit log."""
    survive_hangup()
    from dom0_middleware.grid import run_middleware

    settings = load_settings(MiddlewareSettings, config)
    configure_logs(settings.log_level)

    settings.card.ask_for_pin(f"the hypervisor's card ({settings.card.place})")

    async def make() -> AbstractAsyncContextManager[object]:
        return run_middleware(settings, read_again=lambda: load_settings(MiddlewareSettings, config))

    def ready() -> None:
        facts = {"orchestrators": str(settings.orchestrator_socket), "libvirt": settings.libvirt.uri}
        if settings.orchestrators.address is not None:
            facts["orchestrators_tcp"] = settings.orchestrators.address
        grid, channel = settings.grid, settings.channel
        facts |= {"grid": grid.service_provider, "card": str(settings.card.place), "channel": channel.kind}
        if channel.tcp is not None and channel.kind == "tcp":
            facts["guests"] = f"{channel.tcp.address}, ports {channel.tcp.ports}"
        if settings.metrics_port is not None:
            facts["metrics"] = f"127.0.0.1:{settings.metrics_port}"
        log.info("the daemon is ready", extra=facts)

    run_daemon(make, ready=ready, descriptors=DESCRIPTORS)


app.command("check")(state.check)
app.command("status")(state.status)


app.command("readers")(show_readers)


@policy_app.command("check")
def policy_check(
    file: Annotated[
        Path | None, typer.Option("--file", help="A policy file; default: that of the settings.", dir_okay=False)
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Say whether a policy file is valid; every problem at once."""
    path = file or load_settings(MiddlewareSettings, config).policy
    try:
        rules = load_settings(PolicyFile, path).rule
    except SettingsError as error:
        said = "\n".join(f"error: {problem}" for problem in error.problems)
        if as_json:
            tell("", {"file": str(path), "valid": False, "problems": error.problems}, as_json=True)
        else:
            typer.echo(said, err=True)
        raise typer.Exit(ExitCode.CONFIG) from None
    said = f"{path} is valid: {len(rules)} rules" + ("" if rules else "; everything is denied")
    tell(said, {"file": str(path), "valid": True, "rules": len(rules)}, as_json=as_json)


def main() -> None:
    """Entry point; errors become exit codes (see the module)."""
    run(
        app,
        {
            CallRefused: ExitCode.REFUSED,
            CallInvalid: ExitCode.DATA,
            DaemonUnavailable: ExitCode.UNAVAILABLE,
            Unavailable: ExitCode.UNAVAILABLE,
            BadInput: ExitCode.DATA,
            UnknownVm: ExitCode.DATA,
            AmbiguousVm: ExitCode.DATA,
            NoCredentials: ExitCode.CONFIG,
            CloudInitError: ExitCode.DATA,
            CardError: ExitCode.UNAVAILABLE,
            SettingUnusable: ExitCode.CONFIG,
            MiddlewareError: ExitCode.FAILED,
            AuditBusyError: ExitCode.CONFIG,
            AuditBrokenError: ExitCode.DATA,
        },
    )
