"""``gose racs``: a node that lends its cards (``serve``), its certificate (``sign``), and a look at one from afar (``list``)."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import TypeAdapter, ValidationError

from gose.authority import AuthorityFolder
from gose.authority.certificate_authority import check_request
from gose.authority.errors import IssuanceError
from gose.racs.settings import NodeSettings
from gose.racs.tls import client_side
from gose.settings import Address, GoseSettings, ListenAddress
from secfunet.identity import Holder, Role, check_name, der_of, pem_of, thumbprint
from secfunet.racs.inventory import ask_inventory
from secfunet.service.daemon import run_daemon
from secfunet.service.files import write_atomically
from secfunet.service.logs import configure_logs
from secfunet.service.settings import load_settings

DAY: Final = 86400.0

racs_app = typer.Typer(help="Cards for grids on other hosts (RACS): lend them, and look at them.", no_args_is_help=True)


@racs_app.command()
def serve(
    config: Annotated[
        Path, typer.Option("--config", envvar="GOSE_RACS_CONFIG", help="The node's settings (TOML).", show_default=True)
    ] = Path("racs.toml"),
) -> None:
    """Lend this host's cards to the users in the settings until SIGTERM."""
    from gose.racs.server import NodeService

    settings = load_settings(NodeSettings, config)
    configure_logs(settings.log_level)

    async def make_service() -> AbstractAsyncContextManager[object]:
        return NodeService(settings)

    run_daemon(make_service)


@racs_app.command()
def sign(
    name: str,
    request: Annotated[Path, typer.Option(help="PKCS#10 request (PEM) whose common name is NAME.", exists=True)],
    host: Annotated[list[str], typer.Option(help="DNS name or IP address of the node; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the certificate (PEM).")],
    days: Annotated[int, typer.Option(min=1, max=3652, help="How long it is valid.")] = 365,
    config: Annotated[
        Path, typer.Option("--config", envvar="GOSE_CONFIG", help="The grid's settings (TOML).", show_default=True)
    ] = Path("gose.toml"),
) -> None:
    """Certify a node: a host that lends cards to this grid, or this grid itself as a user of such a host."""
    holder = Holder(Role.NODE, check_name(name))
    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority).certificate_authority
    try:
        der = x509.load_pem_x509_csr(request.read_bytes()).public_bytes(Encoding.DER)
    except ValueError as error:
        raise IssuanceError(f"{request} is no PKCS#10 request: {error}") from None
    certificate = der_of(
        authority.issue(holder, check_request(der, holder), now=time.time(), valid=days * DAY, server_names=host)
    )
    write_atomically(out, pem_of(certificate), mode=0o644)
    typer.echo(f"node {name} is certified: {thumbprint(certificate)}")


@racs_app.command("list")
def list_cards(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    key: Annotated[Path, typer.Option(help="Private key (PEM, mode 0600).")],
    certificate: Annotated[Path, typer.Option(help="Its certificate (PEM).")],
    authority: Annotated[Path, typer.Option(help="The authority of the node's certificate (PEM).")],
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds.")] = 10.0,
) -> None:
    """Show which cards a node lends to the holder of this certificate."""
    where = _address(address)
    context = client_side(key, certificate, authority)
    inventory = asyncio.run(ask_inventory(where.host, where.port, context, timeout=timeout))
    typer.echo(f"RACS {inventory.version}")
    for seid in inventory.seids:
        typer.echo(seid)


def _address(text: str) -> Address:
    try:
        return TypeAdapter(ListenAddress).validate_python(text)
    except ValidationError:
        raise typer.BadParameter("an address is written 'host:port'") from None
