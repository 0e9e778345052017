"""``gose user``: the cards of people, and the tokens that they keep in them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from gose.authority import AuthorityFolder
from gose.authority.ledger import Action, AuthorityRecord
from gose.commands.options import CONFIG, ConfigOption, ValidOption
from gose.commands.requests import certify
from gose.registry import open_registry
from gose.settings import GoseSettings
from secfunet.container import ContainerProfile
from secfunet.identity import Holder, Role, check_name, load_certificate
from secfunet.service.cli import JsonOption, tell
from secfunet.service.files import read_secret
from secfunet.service.results import write_result
from secfunet.service.settings import load_settings
from secfunet.user_token import MAX_VALUE

app = typer.Typer(help="People who have a card, and the tokens in it.", no_args_is_help=True)


@app.command()
def sign(
    name: str,
    request: Annotated[Path, typer.Option(help="What 'secure-element request' wrote beside the card.", exists=True)],
    out: Annotated[Path, typer.Option("--out", help="Where to write the certificate (PEM).")],
    valid: ValidOption = "365d",  # type: ignore[assignment]  # typer parses the default, too
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Certify the card of a user by its request; 'secure-element install' takes the certificate. Its key is RSA."""
    found = certify(load_settings(GoseSettings, config), Holder(Role.USER, check_name(name)), request, out, valid=valid)
    facts = {"role": str(Role.USER), "name": name, "thumbprint": found}
    tell(f"user {name} is certified: {found}", facts, as_json=as_json)


@app.command("issue-token")
def issue_token(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="What the card is to call it.")],
    certificate: Annotated[Path, typer.Option(help="Certificate (PEM) of the card for which it is.", exists=True)],
    value_file: Annotated[Path, typer.Option(help=f"File (mode 0600) with the token, at most {MAX_VALUE} bytes.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the container: for 'secure-element token load'.")],
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Pack a token into a container that this card alone opens, and takes once."""
    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority)
    attempt = AuthorityRecord(Action.USER_TOKEN, "failed", detail=f"token {token}")
    with open_registry(settings.database) as registry, authority.ledger.attempt(attempt):
        container = authority.user_token_authority.issue(
            registry,
            certificate=load_certificate(certificate.read_bytes()),
            name=token,
            value=read_secret(value_file, limit=MAX_VALUE),
            profile=ContainerProfile.named(settings.container_profile),
            now=time.time(),
        )
    write_result(container, out, mode=0o644)
    said = f"{out}: {len(container)} bytes; load containers in the order in which they were made"
    tell(said, {"token": token, "out": str(out), "size": len(container)}, as_json=as_json)


@app.command("token-authority")
def token_authority(
    out: Annotated[
        Path, typer.Option("--out", help="Where to write the public key (PEM): for 'secure-element token trust'.")
    ],
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Write the public key of this grid's authority of users' tokens, which is made if there is none."""
    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority)
    _ = authority.user_token_authority
    write_result(authority.user_tokens_path.read_bytes(), out, mode=0o644)
    tell(f"tokens of users are signed by {out}", {"out": str(out)}, as_json=as_json)
