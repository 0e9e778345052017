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
from secfunet.service.cli import JsonOption, tell
from secfunet.service.settings import load_settings
from secfunet.service.tables import moment

app = typer.Typer()


@app.command()
def init(
    config: ConfigOption = CONFIG,
    ca_key: Annotated[str, typer.Option(help="Key of the CA: p-384 or rsa-3072.")] = "p-384",
    tokens: Annotated[
        str, typer.Option(help="Key of the token authority: rsa-2048 (PS256) or p-256 (ES256).")
    ] = "rsa-2048",
    as_json: JsonOption = False,
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
    said = f"authority made in {authority.path}\nclients trust {authority.ca_path}"
    tell(said, {"authority": str(authority.path), "ca": str(authority.ca_path)}, as_json=as_json)


@app.command("renew-servers")
def renew_servers(as_json: JsonOption = False, config: ConfigOption = CONFIG) -> None:
    """Give the service provider and the OpenID provider new certificates, for the names in the settings; then send the grid SIGHUP."""
    settings = load_settings(GoseSettings, config)
    certificates = AuthorityFolder(settings.authority).renew_servers(server_names(settings), now=time.time())
    facts = [
        {"subject": one.subject.rfc4514_string(), "until": int(one.not_valid_after_utc.timestamp())}
        for one in certificates
    ]
    said = "\n".join(
        f"new certificate for {one.subject.rfc4514_string()} until {moment(one.not_valid_after_utc.timestamp())}"
        for one in certificates
    )
    tell(said, facts, as_json=as_json)
