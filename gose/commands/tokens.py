"""``gose issue-token`` and ``gose revoke``: rights are given, and taken away."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gose.authority import AuthorityFolder
from gose.authority.ledger import Action, AuthorityRecord
from gose.authority.revocation import revoke_identity
from gose.authority.revocation import revoke_token as revoke_one_token
from gose.commands.options import CONFIG, ConfigOption, ValidOption, parse_operations
from gose.commands.resources import note_missing_card
from gose.registry import open_registry
from gose.settings import GoseSettings
from secfunet.identity import Role
from secfunet.operation import OPERATIONS
from secfunet.service.results import write_result
from secfunet.service.settings import load_settings

app = typer.Typer()
revoke_app = typer.Typer(
    help="Revoke a token, or everything of a VM, a hypervisor or a server, at once.", no_args_is_help=True
)
app.add_typer(revoke_app, name="revoke")


@app.command("issue-token")
def issue_token(
    vm: Annotated[str, typer.Option(help="Name of the VM.")],
    hypervisor: Annotated[str, typer.Option(help="Name of the hypervisor that it runs on.")],
    operations: Annotated[str, typer.Option(metavar="LIST", help="Some of sign,decrypt,encrypt.")] = ",".join(
        OPERATIONS
    ),
    valid: ValidOption = "8h",  # type: ignore[assignment]  # likewise
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (mode 0600) in place of standard output.")
    ] = None,
    config: ConfigOption = CONFIG,
) -> None:
    """Issue a VM-Auth-Token: the VM may use its key from that hypervisor, for these operations, until then."""
    allowed = parse_operations(operations)
    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority)
    attempt = AuthorityRecord(Action.TOKEN, "failed", role=Role.VM, name=vm, hypervisor=hypervisor)
    with open_registry(settings.database) as registry, authority.ledger.attempt(attempt):
        token = authority.token_authority.issue(
            registry,
            vm=vm,
            hypervisor=hypervisor,
            audience=settings.audience,
            operations=allowed,
            now=time.time(),
            valid=valid,
        )
        seid = registry.named(Role.VM, vm).seid
    write_result(token.encode("ascii") + b"\n", out)
    note_missing_card(settings, seid)


@revoke_app.command("token")
def revoke_token(jti: str, config: ConfigOption = CONFIG) -> None:
    """Revoke one VM-Auth-Token; 'gose status' lists the JTIs."""
    settings = load_settings(GoseSettings, config)
    with open_registry(settings.database) as registry:
        revoke_one_token(registry, AuthorityFolder(settings.authority).ledger, jti)
    typer.echo(f"token {jti} is revoked")


def _revoker(role: Role) -> Callable[[str, Path], None]:
    def revoke(name: str, config: ConfigOption = CONFIG) -> None:
        settings = load_settings(GoseSettings, config)
        with open_registry(settings.database) as registry:
            revocations = revoke_identity(registry, AuthorityFolder(settings.authority).ledger, role, name)
        for revocation in revocations:
            typer.echo(f"{role} {name}: {revocation.value} is revoked")

    revoke.__doc__ = f"Revoke every certificate of a {role}: its tokens and sessions fall with it."
    return revoke


for _role in (Role.HYPERVISOR, Role.VM, Role.SERVER):
    revoke_app.command(_role.value)(_revoker(_role))
