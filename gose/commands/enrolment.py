"""``gose enrol-*`` and ``gose sign-hypervisor``: key pairs are made in cards, and certified."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from gose.authority import AuthorityFolder, CardAccess, EnrolmentOrder, enrol, sign_request
from gose.authority.ledger import Action, AuthorityRecord
from gose.commands.options import (
    CONFIG,
    CertificateOption,
    ConfigOption,
    KeyOption,
    ReplaceOption,
    SecureElementOption,
    ValidOption,
)
from gose.commands.requests import read_request
from gose.commands.resources import access_to, element_of, holder, note_missing_card, server_names
from gose.registry import Identity, open_registry
from gose.settings import GoseSettings
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.parameters import KeyAlgorithm
from secfunet.card.place import parse_place
from secfunet.identity import Role, pem_of
from secfunet.service.cli import JsonOption, tell
from secfunet.service.results import write_result
from secfunet.service.settings import load_settings

app = typer.Typer()


@app.command("enrol-hypervisor")
def enrol_hypervisor(
    name: str,
    card: Annotated[
        str, typer.Option("--card", help="The card's Unix socket, or pcsc:READER ('gose readers' shows them).")
    ],
    administrator_keys_file: Annotated[
        Path, typer.Option(help="File of mode 0600 with the SCP03 keys of the card's administrator.")
    ],
    out: CertificateOption,
    identity: Annotated[str, typer.Option(help="Friendly name of the TLS-Id on the card.")] = "hypervisor",
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Make the card at a socket or in a reader the card of a hypervisor. Its key is RSA: containers are made for it."""
    order = EnrolmentOrder(holder(Role.HYPERVISOR, name), identity, key, valid, replace=replace)
    access = CardAccess.at(parse_place(card), AdministratorKeys.read(administrator_keys_file))
    _enrol(load_settings(GoseSettings, config), order, access, out, as_json=as_json)


@app.command("sign-hypervisor")
def sign_hypervisor(
    name: str,
    request: Annotated[
        Path, typer.Option(help="What 'secure-element request' wrote on the hypervisor's host.", exists=True)
    ],
    out: CertificateOption,
    valid: ValidOption = "365d",  # type: ignore[assignment]  # typer parses the default, too
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Renew it, or give its name to another card; its tokens end with the old certificate."
        ),
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Enrol the hypervisor whose card lies on another host, by that card's request; 'secure-element install' takes the certificate."""
    settings = load_settings(GoseSettings, config)
    der = read_request(request)
    order = EnrolmentOrder(holder(Role.HYPERVISOR, name), "hypervisor", KeyAlgorithm.RSA_2048, valid, replace=replace)
    authority = AuthorityFolder(settings.authority)
    with open_registry(settings.database) as registry, authority.ledger.attempt(_attempt(order)):
        identity = sign_request(order, der, authority.certificate_authority, registry, clock=time.time)
    _write_certificate(identity, out, as_json=as_json)


@app.command("enrol-vm")
def enrol_vm(
    name: str,
    seid: SecureElementOption,
    out: CertificateOption,
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Allocate a secure element of the grid to a VM."""
    settings = load_settings(GoseSettings, config)
    element = element_of(settings, seid, Role.VM)
    order = EnrolmentOrder(holder(Role.VM, name), element.label, key, valid, seid=seid, replace=replace)
    _enrol(settings, order, access_to(settings, element), out, as_json=as_json)


@app.command("enrol-server")
def enrol_server(
    name: str,
    seid: SecureElementOption,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the certificate (PEM).")] = None,
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Make a secure element of the grid one of those that serve the login page, for the names in the settings."""
    settings = load_settings(GoseSettings, config)
    element = element_of(settings, seid, Role.SERVER)
    order = EnrolmentOrder(
        holder(Role.SERVER, name),
        element.label,
        key,
        valid,
        seid=seid,
        server_names=server_names(settings),
        replace=replace,
    )
    _enrol(settings, order, access_to(settings, element), out, as_json=as_json)


@app.command("enrol-cards")
def enrol_cards(
    out: Annotated[Path, typer.Option("--out", help="Folder for the certificates, NAME.pem.", file_okay=False)],
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    replace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEID", help="Generate a new key for this card even though it has a certificate (repeatable)."
        ),
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Enrol every secure element of the settings that has no certificate in the folder yet, each under its SEID."""
    settings = load_settings(GoseSettings, config)
    anew = set(replace or ())
    if unknown := anew - {element.seid for element in settings.secure_elements}:
        raise typer.BadParameter(f"the settings have no secure element '{min(unknown)}'", param_hint="--replace")
    for element in settings.secure_elements:
        certificate = out / f"{element.seid}.pem"
        if certificate.exists() and element.seid not in anew:
            continue
        enrol_one = enrol_server if element.role == "server" else enrol_vm
        enrol_one(
            element.seid,
            element.seid,
            certificate,
            key,
            valid,
            replace=element.seid in anew,
            as_json=as_json,
            config=config,
        )


def _enrol(
    settings: GoseSettings, order: EnrolmentOrder, access: CardAccess, out: Path | None, *, as_json: bool
) -> None:
    authority = AuthorityFolder(settings.authority)
    with open_registry(settings.database) as registry, authority.ledger.attempt(_attempt(order)):
        identity: Identity = asyncio.run(
            enrol(order, access, authority.certificate_authority, registry, clock=time.time)
        )
    _write_certificate(identity, out, as_json=as_json)
    note_missing_card(settings, order.seid)


def _attempt(order: EnrolmentOrder) -> AuthorityRecord:
    role, name = order.holder
    return AuthorityRecord(Action.ENROL, "failed", role=role, name=name, seid=order.seid or "")


def _write_certificate(identity: Identity, out: Path | None, *, as_json: bool) -> None:
    if out is not None:
        write_result(pem_of(identity.certificate), out, mode=0o644)
    facts = {
        "role": str(identity.role),
        "name": identity.name,
        "thumbprint": identity.thumbprint,
        "seid": identity.seid,
        "until": int(identity.expires_at),
    }
    tell(f"{identity.role} {identity.name} is enrolled: {identity.thumbprint}", facts, as_json=as_json)
