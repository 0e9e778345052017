"""``secure-element authenticate``: a served card is authenticated by a RADIUS server, as a peer of 802.1X."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import typer

from secfunet.card import TlsParameters, ready_card
from secfunet.card.client import tell_tls_parameters
from secfunet.card.parameters import TLS_1_2, TLS_1_3
from secfunet.card.place import CardPlace, connect_card, segmentation_at
from secfunet.radius.access import AccessClient
from secfunet.radius.errors import RadiusSilenceError
from secfunet.radius.peer import Authenticated, authenticate
from secfunet.radius.udp import radius_port
from secfunet.radius.wire import MAX_EAP, MIN_MTU, MIN_SECRET
from secfunet.service.cli import JsonOption
from secfunet.service.files import read_secret
from secfunet.service.settings import load_settings
from secfunet.tls.server_names import verify_server_name
from secure_element.errors import SecureElementError
from secure_element.personalise import CONNECT_TIMEOUT
from secure_element.settings import CardSettings

DEFAULT_PORT: Final = 1812
_VERSIONS: Final = {TLS_1_2: "1.2", TLS_1_3: "1.3"}
_RANGES: Final = {"1.2": (TLS_1_2, TLS_1_2), "1.3": (TLS_1_3, TLS_1_3), "any": (TLS_1_2, TLS_1_3)}


class RadiusSecretError(SecureElementError):
    """The shared secret cannot be used."""


@dataclass(frozen=True)
class Order:
    """Who is to be authenticated where. ``server_name``: what the server's certificate must name; None: any of the card's authority.

    ``timeout``: seconds for the whole; ``patience``: for one answer of the server's.
    """

    host: str
    port: int
    secret: bytes = field(repr=False)
    identity: str | None
    server_name: str | None
    versions: tuple[int, int]
    mtu: int
    timeout: float
    patience: float


async def authenticate_card(place: CardPlace, pin: bytes, order: Order) -> Authenticated:
    """Takes the card, has it authenticated, and gives it back, however that ends.

    Raises what secfunet.radius.peer.authenticate raises, ServerNameError, and what a card raises.
    """
    port_of_card = await connect_card(place, timeout=CONNECT_TIMEOUT)
    card = await ready_card(port_of_card, pin=pin, segmentation=segmentation_at(place))
    try:
        async with (
            asyncio.timeout(order.timeout),
            radius_port(order.host, order.port, patience=order.patience) as port,
        ):
            identity = order.identity or await card.current_identity()
            await card.set_identity(identity)
            low, high = order.versions
            await tell_tls_parameters(
                card, TlsParameters(min_version=low, max_version=high, resume=False, eap_mtu=order.mtu)
            )
            client = AccessClient(order.secret, nas="secure-element", mtu=order.mtu)
            done = await authenticate(card, client, port.exchange, unix_time=int(time.time()))
    except TimeoutError:
        raise RadiusSilenceError(f"the authentication is not over after {order.timeout:g} s") from None
    finally:
        await card.close()
    if order.server_name is not None:
        verify_server_name(done.server_certificate, order.server_name)
    return done


def authenticate_command(
    config: Annotated[Path, typer.Option("--config", help="The card's TOML file.", show_default=False)],
    radius: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help=f"The RADIUS server; port {DEFAULT_PORT} if missing.")
    ],
    secret_file: Annotated[
        Path, typer.Option(help="File (mode 0600) with the secret that the server has for this host.")
    ],
    user_pin_file: Annotated[Path | None, typer.Option(help="File (mode 0600); asked for if missing.")] = None,
    identity: Annotated[
        str | None,
        typer.Option(help="Friendly name of the TLS-Id; the card's first one if missing.", show_default=False),
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(help="DNS name or IP address that the server's certificate must have.", show_default=False),
    ] = None,
    tls: Annotated[str, typer.Option(help="1.2, 1.3 or any.")] = "any",
    mtu: Annotated[int, typer.Option(min=MIN_MTU, max=MAX_EAP, help="Longest EAP packet, either way.")] = 1400,
    timeout: Annotated[float, typer.Option(min=1, max=600, help="Seconds for the whole.")] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Have the card authenticated by a RADIUS server with EAP-TLS, and compare the keys of both ends. No key is shown or kept."""
    if tls not in _RANGES:
        raise typer.BadParameter(f"TLS is one of {', '.join(_RANGES)}")
    host, port = _address(radius)
    settings = load_settings(CardSettings, config)
    secret = read_secret(secret_file).strip()
    if len(secret) < MIN_SECRET:
        raise RadiusSecretError(f"{secret_file}: a RADIUS secret has at least {MIN_SECRET} bytes")
    pin = read_secret(user_pin_file).strip() if user_pin_file else str(typer.prompt("PIN", hide_input=True)).encode()
    order = Order(
        host, port, secret, identity, server_name, _RANGES[tls], mtu, timeout, patience=min(10.0, timeout / 2)
    )
    done = asyncio.run(authenticate_card(settings.place, pin, order))
    report = {
        "identity": done.identity,
        "tls": _VERSIONS[done.tls.version],
        "suite": f"{done.tls.suite:04X}",
        "rounds": done.rounds,
        "keys": "the same at both ends",
    }
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(
        f"{report['identity']} is authenticated: TLS {report['tls']}, suite {report['suite']}, {report['rounds']} packets, "
        "the keys of card and server are the same"
    )


def _address(text: str) -> tuple[str, int]:
    """``host``, ``host:port``, ``[address]:port``. Anything else is a usage error."""
    host, separator, port = text.rpartition(":")
    if not separator or (":" in host and not host.endswith("]")):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise typer.BadParameter("a RADIUS server is written HOST or HOST:PORT")
    return host, int(port)
