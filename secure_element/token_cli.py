"""``secure-element token``: the tokens in a served card, and whose tokens it takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from secfunet.card import CardClient, ready_card
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.place import connect_card, segmentation_at
from secfunet.card.tokens import CardTokens
from secfunet.container import ContainerProfile, ProfileName
from secfunet.service.cli import JsonOption, tell
from secfunet.service.files import read_secret
from secfunet.service.results import write_result
from secfunet.service.settings import load_settings
from secfunet.user_token import MAX_CONTAINER, UserTokenError, key_digest, load_authority_key
from secure_element.personalise import CONNECT_TIMEOUT, administrator_of
from secure_element.settings import CardSettings

token_app = typer.Typer(help="The tokens in a served card.", no_args_is_help=True)

DEFAULT_CONFIG: Final = Path("/etc/secfunet/secure-element.toml")
ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        envvar="SECURE_ELEMENT_CONFIG",
        help="The card's settings (TOML).",
        default_factory=lambda: DEFAULT_CONFIG,
        show_default=str(DEFAULT_CONFIG),
    ),
]
PinOption = Annotated[Path | None, typer.Option("--user-pin-file", help="File (mode 0600); asked for if missing.")]
IdentityOption = Annotated[
    str | None, typer.Option(help="Friendly name of the TLS-Id; the card's first one if missing.", show_default=False)
]
KeysFileOption = Annotated[
    Path, typer.Option("--administrator-keys-file", help="File (mode 0600) with the administrator's SCP03 keys.")
]
AuthorityArgument = Annotated[
    Path, typer.Argument(metavar="AUTHORITY", help="Public key (PEM) of the authority.", exists=True)
]

_PROFILES: Final[tuple[ProfileName, ...]] = ("oaep-pss-sha256", "pkcs1-v1_5")


@token_app.command()
def load(
    container: Annotated[Path, typer.Argument(help="What the authority made for this card.", exists=True)],
    config: ConfigOption,
    user_pin_file: PinOption = None,
    identity: IdentityOption = None,
    profile: Annotated[str, typer.Option(help=", ".join(_PROFILES))] = _PROFILES[0],
) -> None:
    """Give the card a container: it checks who made it, opens it with its own key, and keeps the token. Once only."""
    if profile not in _PROFILES:
        raise typer.BadParameter(f"a profile is one of {', '.join(_PROFILES)}")
    with container.open("rb") as file:
        content = file.read(MAX_CONTAINER + 1)
    if len(content) > MAX_CONTAINER:
        raise UserTokenError(f"{container} is no token's container: one has at most {MAX_CONTAINER} bytes")

    async def act() -> None:
        async with _user(config, user_pin_file, identity) as tokens:
            await tokens.load(content, ContainerProfile.named(profile))

    asyncio.run(act())
    typer.echo("the card has the token")


@token_app.command("list")
def list_tokens(
    config: ConfigOption,
    user_pin_file: PinOption = None,
    identity: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the tokens of an identity: name, size, and the counter that they came with."""

    async def act() -> list[dict[str, str | int]]:
        async with _user(config, user_pin_file, identity) as tokens:
            return [{"name": one.name, "size": one.size, "counter": one.counter} for one in await tokens.stored()]

    found = asyncio.run(act())
    text = "\n".join(f"{one['name']}: {one['size']} bytes, counter {one['counter']}" for one in found)
    tell(text, found, as_json=as_json)


@token_app.command()
def read(
    name: str,
    config: ConfigOption,
    user_pin_file: PinOption = None,
    identity: IdentityOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (mode 0600) in place of standard output.")
    ] = None,
) -> None:
    """Take a token out of the card, byte for byte."""

    async def act() -> bytes:
        async with _user(config, user_pin_file, identity) as tokens:
            return await tokens.value(name)

    value = asyncio.run(act())
    write_result(value, out)


@token_app.command()
def delete(name: str, config: ConfigOption, user_pin_file: PinOption = None, identity: IdentityOption = None) -> None:
    """Have the card forget a token. Its container cannot be loaded again."""

    async def act() -> None:
        async with _user(config, user_pin_file, identity) as tokens:
            await tokens.delete(name)

    asyncio.run(act())
    typer.echo(f"the card has no '{name}' any more")


@token_app.command()
def trust(authority: AuthorityArgument, config: ConfigOption, administrator_keys_file: KeysFileOption) -> None:
    """Have the card take the tokens of an authority."""
    key = _authority_key(authority)

    async def act() -> None:
        async with _administrator(config, administrator_keys_file) as tokens:
            await tokens.trust(key)

    asyncio.run(act())
    typer.echo(f"the card takes tokens of {key_digest(key).hex()}")


@token_app.command()
def distrust(authority: AuthorityArgument, config: ConfigOption, administrator_keys_file: KeysFileOption) -> None:
    """Have the card take the tokens of an authority no longer; those that it has stay."""
    digest = key_digest(_authority_key(authority))

    async def act() -> None:
        async with _administrator(config, administrator_keys_file) as tokens:
            await tokens.distrust(digest)

    asyncio.run(act())
    typer.echo(f"the card takes no tokens of {digest.hex()} any more")


@token_app.command()
def authorities(config: ConfigOption, administrator_keys_file: KeysFileOption, as_json: JsonOption = False) -> None:
    """Show whose tokens the card takes: SHA-256 of the public key, and the last counter taken."""

    async def act() -> list[dict[str, str | int]]:
        async with _administrator(config, administrator_keys_file) as tokens:
            return [{"digest": one.digest.hex(), "counter": one.counter} for one in await tokens.authorities()]

    found = asyncio.run(act())
    tell("\n".join(f"{one['digest']}: counter {one['counter']}" for one in found), found, as_json=as_json)


@contextlib.asynccontextmanager
async def _user(config: Path, pin_file: Path | None, identity: str | None) -> AsyncIterator[CardTokens]:
    settings = load_settings(CardSettings, config)
    pin = read_secret(pin_file).strip() if pin_file else str(typer.prompt("PIN", hide_input=True, err=True)).encode()
    port = await connect_card(settings.place, timeout=CONNECT_TIMEOUT)
    segmentation = segmentation_at(settings.place)
    client: CardClient = await ready_card(port, pin=pin, identity=identity, segmentation=segmentation)
    try:
        yield CardTokens(client)
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def _administrator(config: Path, keys_file: Path) -> AsyncIterator[CardTokens]:
    settings = load_settings(CardSettings, config)
    async with administrator_of(settings.place, AdministratorKeys.read(keys_file)) as client:
        yield CardTokens(client)


def _authority_key(path: Path) -> bytes:
    """SubjectPublicKeyInfo, DER. Raises UserTokenError."""
    try:
        key = load_pem_public_key(path.read_bytes()).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError):
        raise UserTokenError(f"{path} holds no public key (PEM)") from None
    load_authority_key(key)
    return key
