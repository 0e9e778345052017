"""``gose init`` and ``gose renew-servers``: the grid's own keys and certificates."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from gose.authority import AuthorityFolder, create_authority
from gose.commands.options import CONFIG, ConfigOption
from gose.commands.resources import server_names
from gose.registry import open_registry
from gose.settings import GoseSettings
from secfunet.service.settings import load_settings

app = typer.Typer()


@app.command()
def init(
    config: ConfigOption = CONFIG,
    ca_key: Annotated[str, typer.Option(help="Key of the CA: p-384 or rsa-3072.")] = "p-384",
    tokens: Annotated[
        str, typer.Option(help="Key of the token authority: rsa-2048 (PS256) or p-256 (ES256).")
    ] = "rsa-2048",
) -> None:
    """Make the grid's authority: CA, token authority, container authority, and the servers' certificates.

    Its cards are those of the settings: 'socket', 'pcsc' ('gose readers' shows what there is) or 'racs'.
    """
    settings = load_settings(GoseSettings, config)
    authority = create_authority(
        settings.authority, server_names(settings), now=time.time(), ca_key=ca_key, tokens=tokens
    )
    with open_registry(settings.database):
        pass
    typer.echo(f"authority made in {authority.path}")
    typer.echo(f"clients trust {authority.ca_path}")


@app.command("renew-servers")
def renew_servers(config: ConfigOption = CONFIG) -> None:
    """Give the service provider and the OpenID provider new certificates, for the names in the settings; then send the grid SIGHUP."""
    settings = load_settings(GoseSettings, config)
    certificates = AuthorityFolder(settings.authority).renew_servers(server_names(settings), now=time.time())
    for certificate in certificates:
        typer.echo(
            f"new certificate for {certificate.subject.rfc4514_string()} until {certificate.not_valid_after_utc:%Y-%m-%d}"
        )
