"""``secure-element``: make a card, serve it, ask how it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import string
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Final

import typer

from secfunet.apdu import ApduError
from secfunet.card import CardBusyError, CardClient, CardError, CardFormatError, CardGoneError, PinRole, connect_unix
from secfunet.card.client import pad_pin
from secfunet.service.cli import ExitCode, print_version, run
from secfunet.service.daemon import run_daemon
from secfunet.service.files import private_folder, read_secret, write_atomically
from secfunet.service.logs import configure_logs
from secfunet.service.settings import load_settings
from secure_element.card_os import CardOs
from secure_element.errors import SecureElementError, StoreError
from secure_element.metrics import CardMetrics
from secure_element.pin import ATTEMPTS, make_pin
from secure_element.server import CardServer
from secure_element.settings import CardSettings
from secure_element.store import CardStore, StoreContents

app = typer.Typer(
    help="A secure element in software: an EAP-TLS smartcard behind a Unix socket (vpcd framing).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="The card's TOML file.", show_default=False)]
UserPinOption = Annotated[Path | None, typer.Option(help="File (mode 0600) with the user's PIN; asked for if missing.")]
OperatorPinOption = Annotated[Path | None, typer.Option(help="The same for the operator's PIN.")]
GeneratePinsOption = Annotated[bool, typer.Option(help="Make random PINs and write them to these two files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]

_PIN_LETTERS: Final = string.ascii_letters + string.digits
_STATUS_TIMEOUT: Final = 5.0


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version("secure-element"), is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options that every command has."""


@app.command()
def init(
    config: ConfigOption,
    user_pin_file: UserPinOption = None,
    operator_pin_file: OperatorPinOption = None,
    generate_pins: GeneratePinsOption = False,
) -> None:
    """Make the card's store, and its key file if the settings name one that does not exist. An existing store is never touched."""
    settings = load_settings(CardSettings, config)
    if settings.store.exists():
        raise StoreError(f"{settings.store} exists already: its keys would be lost")
    pins = {
        PinRole.USER: _new_pin("user", user_pin_file, generate_pins),
        PinRole.OPERATOR: _new_pin("operator", operator_pin_file, generate_pins),
    }
    private_folder(settings.store.parent)
    key_file = settings.store_key.file
    if key_file is not None and not key_file.exists():
        private_folder(key_file.parent)
        write_atomically(key_file, secrets.token_hex(32).encode() + b"\n")
        typer.echo(f"store key: {key_file} (whoever has it and the store has the keys: back them up apart)")
    secret = settings.store_key.read(confirm=True)
    contents = StoreContents({role: make_pin(role, pin, secrets.token_bytes) for role, pin in pins.items()})
    CardStore.create(settings.store, secret, contents).close()
    typer.echo(f"store:     {settings.store}")
    attempts = ", ".join(f"{role.name.lower()} {ATTEMPTS[role]} attempts" for role in pins)
    typer.echo(f"PINs:      {attempts}; serve it with: secure-element serve --config {config}")


def _new_pin(role: str, path: Path | None, generate: bool) -> bytes:
    """The padded PIN: generated into ``path``, read from it, or typed."""
    if generate:
        if path is None:
            raise typer.BadParameter(f"--generate-pins needs --{role}-pin-file: somebody must get to know it")
        if path.exists():
            raise typer.BadParameter(f"{path} exists already")
        private_folder(path.parent)
        pin = "".join(secrets.choice(_PIN_LETTERS) for _ in range(8)).encode()
        write_atomically(path, pin + b"\n")
        return pad_pin(pin)
    if path is not None:
        return pad_pin(read_secret(path).strip())
    typed = str(typer.prompt(f"New PIN of the {role} (4 to 8 characters)", hide_input=True, confirmation_prompt=True))
    return pad_pin(typed.encode())


@app.command()
def serve(config: ConfigOption) -> None:
    """Serve the card at its Unix socket until SIGTERM."""
    settings = load_settings(CardSettings, config)
    configure_logs(settings.log_level)
    secret = settings.store_key.read()

    @contextlib.asynccontextmanager
    async def serving() -> AsyncIterator[CardServer]:
        with contextlib.closing(CardStore.open(settings.store, secret)) as store:
            private_folder(settings.socket.parent)
            card = CardOs(store, settings.options)
            mode = int(settings.socket_mode, 8)
            with contextlib.closing(CardMetrics(settings.metrics_port)) as metrics:
                async with CardServer(card, settings.socket, socket_mode=mode, observe=metrics.observe) as server:
                    yield server

    async def make_service() -> AbstractAsyncContextManager[object]:
        return serving()

    run_daemon(make_service)


@app.command()
def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Say whether the card is served, free, and how many PIN attempts are left. Costs none; disturbs no client."""
    settings = load_settings(CardSettings, config)
    report = asyncio.run(_status(settings))
    if as_json:
        typer.echo(json.dumps(report))
    else:
        for key, value in report.items():
            typer.echo(f"{key.replace('_', ' ')}: {value}")
    if report["state"] == "down":
        raise typer.Exit(ExitCode.UNAVAILABLE)


async def _status(settings: CardSettings) -> dict[str, str | int]:
    report: dict[str, str | int] = {"socket": str(settings.socket), "store": str(settings.store)}
    try:
        client = CardClient(await connect_unix(settings.socket, timeout=_STATUS_TIMEOUT))
    except CardBusyError:
        return report | {"state": "in use"}
    except CardGoneError:
        return report | {"state": "down"}
    try:
        await client.select()
        return report | {
            "state": "free",
            "user_pin_attempts": await client.pin_attempts(PinRole.USER),
            "operator_pin_attempts": await client.pin_attempts(PinRole.OPERATOR),
        }
    finally:
        await client.close()


def main() -> None:
    """Entry point."""
    run(
        app,
        {
            StoreError: ExitCode.CONFIG,
            SecureElementError: ExitCode.FAILED,
            CardFormatError: ExitCode.DATA,
            CardError: ExitCode.UNAVAILABLE,
            ApduError: ExitCode.FAILED,
        },
    )


if __name__ == "__main__":
    main()
