"""``gose issue-token`` and ``gose revoke``: rights are given, and taken away."""

from __future__ import annotations

import json
import sys
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
from secfunet.service.cli import JsonOption, tell
from secfunet.service.results import opened_input, write_result
from secfunet.service.settings import load_settings
from secfunet.service.tables import moment
from secfunet.vm_auth_token import MAX_TOKEN_SIZE, unverified_claims

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
    as_json: JsonOption = False,
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
    claims = unverified_claims(token)
    facts = {
        "jti": claims.jti,
        "vm": vm,
        "hypervisor": hypervisor,
        "operations": sorted(claims.operations),
        "until": int(claims.expires_at),
    }
    said = f"token {claims.jti} for {vm} on {hypervisor} until {moment(claims.expires_at)}"
    if as_json and out is None:
        tell("", {**facts, "token": token}, as_json=True)
    else:
        write_result(token.encode("ascii") + b"\n", out)
        if out is not None or not sys.stdout.isatty():
            # What a script wants to revoke later; the token itself is alone on standard output.
            typer.echo(json.dumps(facts, indent=2) if as_json else said, err=out is None)
    note_missing_card(settings, seid)


token_app = typer.Typer(help="VM-Auth-Tokens.", no_args_is_help=True)
app.add_typer(token_app, name="token")


@token_app.command("show")
def show_token(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A VM-Auth-Token; - is standard input.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a VM-Auth-Token says. Its signature and its standing are not checked: 'gose status' has the tokens that hold."""
    with opened_input(file) as stream:
        content = stream.read(MAX_TOKEN_SIZE + 2)
    claims = unverified_claims(content.decode("ascii", "replace").strip())
    facts = {
        "jti": claims.jti,
        "issuer": claims.issuer,
        "audience": claims.audience,
        "vmid": claims.vmid,
        "hvid": claims.hvid,
        "operations": sorted(claims.operations),
        "issued_at": int(claims.issued_at),
        "until": int(claims.expires_at),
    }
    shown = {**facts, "issued_at": moment(claims.issued_at), "until": moment(claims.expires_at)}
    text = "\n".join(
        f"{key.replace('_', ' '):12}{', '.join(value) if isinstance(value, list) else value}"
        for key, value in shown.items()
    )
    tell(text, facts, as_json=as_json)


@revoke_app.command("token")
def revoke_token(jti: str, as_json: JsonOption = False, config: ConfigOption = CONFIG) -> None:
    """Revoke one VM-Auth-Token; 'gose status' lists the JTIs."""
    settings = load_settings(GoseSettings, config)
    with open_registry(settings.database) as registry:
        revoke_one_token(registry, AuthorityFolder(settings.authority).ledger, jti)
    tell(f"token {jti} is revoked", {"jti": jti}, as_json=as_json)


def _revoker(role: Role) -> Callable[[str, bool, Path], None]:
    def revoke(name: str, as_json: JsonOption = False, config: ConfigOption = CONFIG) -> None:
        settings = load_settings(GoseSettings, config)
        with open_registry(settings.database) as registry:
            revocations = revoke_identity(registry, AuthorityFolder(settings.authority).ledger, role, name)
        tell(
            "\n".join(f"{role} {name}: {revocation.value} is revoked" for revocation in revocations),
            {"role": str(role), "name": name, "revoked": [revocation.value for revocation in revocations]},
            as_json=as_json,
        )

    revoke.__doc__ = f"Revoke every certificate of a {role}: its tokens and sessions fall with it."
    return revoke


for _role in (Role.HYPERVISOR, Role.VM, Role.SERVER):
    revoke_app.command(_role.value)(_revoker(_role))
