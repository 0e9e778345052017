"""``gose racs``: a node that lends its cards (``serve``), its certificate (``sign``), and a look at one from afar (``list``)."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from gose.commands.options import CONFIG, ConfigOption, ValidOption
from gose.commands.requests import certify
from gose.racs.settings import NodeSettings
from gose.racs.tls import client_side
from gose.settings import Address, GoseSettings, ListenAddress
from secfunet.identity import Holder, Role, check_name
from secfunet.racs.inventory import ask_inventory
from secfunet.service.cli import JsonOption, tell
from secfunet.service.daemon import run_daemon, survive_hangup
from secfunet.service.logs import configure_logs
from secfunet.service.settings import load_settings

app = typer.Typer(help="Cards for grids on other hosts (RACS): lend them, and look at them.", no_args_is_help=True)


@app.command()
def serve(
    config: Annotated[
        Path, typer.Option("--config", envvar="GOSE_RACS_CONFIG", help="The node's settings (TOML).", show_default=True)
    ] = Path("/etc/secfunet/racs.toml"),
) -> None:
    """Lend this host's cards to the users in the settings until SIGTERM."""
    survive_hangup()
    from gose.racs.server import NodeService

    settings = load_settings(NodeSettings, config)
    configure_logs(settings.log_level)

    async def make_service() -> AbstractAsyncContextManager[object]:
        return NodeService(settings, read_again=lambda: load_settings(NodeSettings, config))

    run_daemon(make_service, descriptors=settings.descriptors)


@app.command()
def sign(
    name: str,
    request: Annotated[Path, typer.Option(help="PKCS#10 request (PEM) whose common name is NAME.", exists=True)],
    host: Annotated[list[str], typer.Option(help="DNS name or IP address of the node; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the certificate (PEM).")],
    valid: ValidOption = "365d",  # type: ignore[assignment]  # typer parses the default, too
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Certify a node: a host that lends cards to this grid, or this grid itself as a user of such a host."""
    holder = Holder(Role.NODE, check_name(name))
    found = certify(load_settings(GoseSettings, config), holder, request, out, valid=valid, server_names=host)
    facts = {"role": str(Role.NODE), "name": name, "thumbprint": found}
    tell(f"node {name} is certified: {found}", facts, as_json=as_json)


@app.command("list")
def list_cards(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    key_file: Annotated[Path, typer.Option("--key-file", help="Private key (PEM, mode 0600).")],
    certificate: Annotated[Path, typer.Option(help="Its certificate (PEM).")],
    authority: Annotated[Path, typer.Option(help="The authority of the node's certificate (PEM).")],
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds to wait.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Show which cards a node lends to the holder of this certificate."""
    where = _address(address)
    context = client_side(key_file, certificate, authority)
    inventory = asyncio.run(ask_inventory(where.host, where.port, context, timeout=timeout))
    facts = {"version": inventory.version, "secure_elements": list(inventory.seids)}
    tell("\n".join([f"RACS {inventory.version}", *inventory.seids]), facts, as_json=as_json)


def _address(text: str) -> Address:
    try:
        return TypeAdapter(ListenAddress).validate_python(text)
    except ValidationError:
        raise typer.BadParameter("an address is written 'host:port'") from None
