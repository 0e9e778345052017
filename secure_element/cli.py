"""``secure-element``: make a card, serve it, ask how it is."""

from __future__ import annotations

import asyncio
import json
import secrets
import string
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Final

import typer

from secfunet.apdu import ApduError
from secfunet.card import (
    CardBusyError,
    CardClient,
    CardError,
    CardFormatError,
    CardGoneError,
    KeyAlgorithm,
)
from secfunet.card.administrator import AdministratorRefusedError
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.client import pad_pin
from secfunet.card.place import connect_card, segmentation_at
from secfunet.card.tokens import TokenRefusedError, TokensFullError, TokenUnknownError
from secfunet.radius.errors import (
    KeysDifferError,
    PeerRefusedError,
    RadiusFormatError,
    RadiusRejectedError,
    RadiusSilenceError,
)
from secfunet.service.cli import VERSION_HELP, ExitCode, JsonOption, application, print_version, run
from secfunet.service.daemon import run_daemon, survive_hangup
from secfunet.service.files import private_folder, read_secret, write_atomically
from secfunet.service.findings import report
from secfunet.service.logs import configure_logs
from secfunet.service.results import write_result
from secfunet.service.settings import load_settings
from secfunet.tls.errors import ServerNameError
from secfunet.user_token import UserTokenError
from secure_element.authenticate import RadiusSecretError, authenticate_command
from secure_element.errors import SecureElementError, StoreError, StoreExistsError
from secure_element.personalise import (
    administrator_of,
    change_pin,
    install_certificate,
    request_certificate,
    rotate_keys,
)
from secure_element.pin import ATTEMPTS, make_pin
from secure_element.settings import CardSettings
from secure_element.store import KEY_DATA_SIZE, CardStore, DomainRecord, StoreContents
from secure_element.token_cli import ConfigOption, token_app

app = application(
    "A secure element in software: an EAP-TLS smartcard behind a Unix socket, or in a virtual reader of pcscd."
)

pin_app = typer.Typer(help="The PIN of a served card.", no_args_is_help=True)
app.add_typer(pin_app, name="pin")
keys_app = typer.Typer(help="The administrator's keys of a served card.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(token_app, name="token")

UserPinOption = Annotated[Path | None, typer.Option(help="File (mode 0600) with the user's PIN; asked for if missing.")]
KeysFileOption = Annotated[
    Path, typer.Option("--administrator-keys-file", help="File (mode 0600) with the administrator's SCP03 keys.")
]
GeneratePinOption = Annotated[bool, typer.Option("--generate-pin", help="Make a random PIN and write it to that file.")]

IdentityOption = Annotated[str, typer.Option(help="Friendly name of the TLS-Id on the card.")]

_ALGORITHMS: Final = {
    "rsa-2048": KeyAlgorithm.RSA_2048,
    "rsa-3072": KeyAlgorithm.RSA_3072,
    "rsa-4096": KeyAlgorithm.RSA_4096,
    "p-256": KeyAlgorithm.P_256,
    "p-384": KeyAlgorithm.P_384,
}
_NEW_PIN: Final = "New PIN of the user (4 to 8 characters)"
_PIN_LETTERS: Final = string.ascii_letters + string.digits
_STATUS_TIMEOUT: Final = 5.0


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version("secure-element"), is_eager=True, help=VERSION_HELP),
    ] = False,
) -> None:
    """Options that every command has."""


@app.command()
def init(
    config: ConfigOption,
    user_pin_file: UserPinOption = None,
    generate_pin: GeneratePinOption = False,
    administrator_keys_file: Annotated[
        Path | None,
        typer.Option(
            help="The administrator's SCP03 keys: random ones are written to it, unless it exists. [default: beside the store]"
        ),
    ] = None,
) -> None:
    """Make the card's store, and its key file if the settings name one that does not exist. An existing store is never touched."""
    settings = load_settings(CardSettings, config)
    if settings.store.exists():
        raise StoreExistsError(f"{settings.store} exists already: its keys would be lost")
    pin = _new_pin(user_pin_file, generate_pin)
    keys_file = administrator_keys_file or settings.store.with_suffix(".keys")
    private_folder(settings.store.parent)
    keys = AdministratorKeys.read(keys_file) if keys_file.exists() else _make_keys(keys_file)
    key_file = settings.store_key.file
    if key_file is not None and not key_file.exists():
        private_folder(key_file.parent)
        write_atomically(key_file, secrets.token_hex(32).encode() + b"\n")
        typer.echo(f"store key: {key_file} (whoever has it and the store has the keys: back them up apart)")
    secret = settings.store_key.read(confirm=True)
    contents = StoreContents(
        make_pin(pin, secrets.token_bytes),
        domain=DomainRecord(secrets.token_bytes(KEY_DATA_SIZE), {keys.version: keys.keys}),
    )
    CardStore.create(settings.store, secret, contents).close()
    typer.echo(f"store:     {settings.store}")
    typer.echo(f"keys:      {keys_file} (whoever has them administers the card: give them to whoever does)")
    typer.echo(f"PIN:       {ATTEMPTS} attempts; serve it with: secure-element serve --config {config}")


def _make_keys(path: Path) -> AdministratorKeys:
    keys = AdministratorKeys.generate()
    keys.write(path)
    return keys


def _new_pin(path: Path | None, generate: bool) -> bytes:
    """The padded PIN: generated into ``path``, read from it, or typed."""
    if generate:
        if path is None:
            raise typer.BadParameter("--generate-pin needs --user-pin-file: somebody must get to know it")
        if path.exists():
            raise StoreExistsError(f"{path} exists already: --generate-pin writes into a new file")
        private_folder(path.parent)
        pin = "".join(secrets.choice(_PIN_LETTERS) for _ in range(8)).encode()
        write_atomically(path, pin + b"\n")
        return pad_pin(pin)
    if path is not None:
        return pad_pin(_read_pin(path))
    typed = str(typer.prompt(_NEW_PIN, hide_input=True, confirmation_prompt=True))
    return pad_pin(typed.encode())


@app.command()
def serve(config: ConfigOption) -> None:
    """Serve the card until SIGTERM: at its Unix socket, or in the virtual reader of pcscd that it attaches itself to.

    SIGHUP reads the log level again.
    """
    # Late: the other commands need not wait for the card's imports.
    from secure_element.serving import serving

    survive_hangup()

    settings = load_settings(CardSettings, config)
    configure_logs(settings.log_level)
    secret = settings.store_key.read()

    async def make_service() -> AbstractAsyncContextManager[object]:
        return serving(settings, secret, read_again=lambda: load_settings(CardSettings, config))

    run_daemon(make_service)


@app.command()
def check(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Say whether a card with these settings would be served: key, store, the place where clients find it. Disturbs no client."""
    from secure_element.checks import look

    settings = load_settings(CardSettings, config)
    report(asyncio.run(look(settings)), as_json=as_json)


@app.command()
def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Say whether the card is served and free, and how many PIN attempts are left. Uses no attempt, and disturbs no client."""
    settings = load_settings(CardSettings, config)
    report = asyncio.run(_status(settings))
    if as_json:
        typer.echo(json.dumps(report))
    else:
        for key, value in report.items():
            typer.echo(f"{key.replace('_', ' ')}: {value}")
    if report["state"] == "down":
        raise typer.Exit(ExitCode.UNAVAILABLE)


@app.command()
def request(
    name: Annotated[str, typer.Argument(help="Whose card it is to be: a hypervisor's name, say.")],
    config: ConfigOption,
    out: Annotated[Path, typer.Option(help="PKCS#10, PEM: for 'gose sign-hypervisor'.")],
    administrator_keys_file: KeysFileOption,
    identity: IdentityOption = "hypervisor",
    key: Annotated[str, typer.Option(help=", ".join(_ALGORITHMS))] = "rsa-2048",
    renew: Annotated[
        bool, typer.Option("--renew", help="Request a certificate for the key that the card already has.")
    ] = False,
) -> None:
    """Make a key pair in the card and a request for its certificate. Run again before the certificate is installed: the same key."""
    if key not in _ALGORITHMS:
        raise typer.BadParameter(f"a key is one of {', '.join(_ALGORITHMS)}")
    settings = load_settings(CardSettings, config)
    keys = AdministratorKeys.read(administrator_keys_file)

    async def act() -> bytes:
        async with administrator_of(settings.place, keys) as client:
            return await request_certificate(client, label=identity, name=name, algorithm=_ALGORITHMS[key], renew=renew)

    write_result(asyncio.run(act()), out, mode=0o644)
    typer.echo(f"request for {name}: {out}")


@app.command()
def install(
    config: ConfigOption,
    certificate: Annotated[Path, typer.Option(help="The certificate for the card's key, PEM.", exists=True)],
    authority: Annotated[Path, typer.Option(help="ca.pem of the grid: all that the card trusts.", exists=True)],
    administrator_keys_file: KeysFileOption,
    identity: IdentityOption = "hypervisor",
) -> None:
    """Load a certificate that was made for this card's request."""
    settings = load_settings(CardSettings, config)
    keys = AdministratorKeys.read(administrator_keys_file)

    async def act() -> str:
        async with administrator_of(settings.place, keys) as client:
            return await install_certificate(
                client, label=identity, certificate=certificate.read_bytes(), authority=authority.read_bytes()
            )

    typer.echo(f"the card is {asyncio.run(act())}'s")


app.command("authenticate")(authenticate_command)


@pin_app.command("change")
def pin_change(
    config: ConfigOption,
    old_pin_file: Annotated[Path | None, typer.Option(help="File (mode 0600); asked for if missing.")] = None,
    new_pin_file: Annotated[Path | None, typer.Option(help="File (mode 0600); asked for if missing.")] = None,
) -> None:
    """Replace the PIN by another one. 'status' tells how many attempts are left; a wrong PIN costs one."""
    settings = load_settings(CardSettings, config)
    old = _read_pin(old_pin_file) if old_pin_file else str(typer.prompt("PIN", hide_input=True)).encode()
    asyncio.run(change_pin(settings.place, old, _unpadded_new(new_pin_file)))
    typer.echo("the PIN is changed: give its users the new one")


@pin_app.command("unblock")
def pin_unblock(
    config: ConfigOption,
    administrator_keys_file: KeysFileOption,
    new_pin_file: Annotated[Path | None, typer.Option(help="File (mode 0600); asked for if missing.")] = None,
) -> None:
    """Give the user a new PIN, by the administrator's right: for a PIN that is blocked or forgotten."""
    settings = load_settings(CardSettings, config)
    keys = AdministratorKeys.read(administrator_keys_file)
    pin = _unpadded_new(new_pin_file)

    async def act() -> None:
        async with administrator_of(settings.place, keys) as client:
            await client.unblock_pin(pin)

    asyncio.run(act())
    typer.echo("the user PIN was replaced; its attempt counter is reset")


@keys_app.command("rotate")
def keys_rotate(config: ConfigOption, administrator_keys_file: KeysFileOption) -> None:
    """Give the card new administrator's keys, and write them to the file. Run again if it was interrupted."""
    settings = load_settings(CardSettings, config)
    keys = asyncio.run(rotate_keys(settings.place, administrator_keys_file))
    typer.echo(
        f"the card has key set {keys.version}: {administrator_keys_file} holds it, copies of the old one are worth nothing"
    )


def _read_pin(path: Path) -> bytes:
    """A PIN that exists, as it is: never from the command line."""
    return read_secret(path).strip()


def _unpadded_new(path: Path | None) -> bytes:
    if path is not None:
        return _read_pin(path)
    return str(typer.prompt(_NEW_PIN, hide_input=True, confirmation_prompt=True)).encode()


async def _status(settings: CardSettings) -> dict[str, str | int]:
    report: dict[str, str | int] = {"place": str(settings.place), "store": str(settings.store)}
    if settings.benchmark_latency is not None:
        report["benchmark_latency"] = "on: this card pretends to be slow"
    try:
        client = CardClient(
            await connect_card(settings.place, timeout=_STATUS_TIMEOUT), segmentation=segmentation_at(settings.place)
        )
    except CardBusyError:
        return report | {"state": "in use"}
    except CardGoneError as error:
        if isinstance(error.__cause__, PermissionError):
            raise  # nothing is known of the card
        return report | {"state": "down"}
    try:
        await client.select()
        return report | {
            "state": "free",
            "pin_attempts": await client.pin_attempts(),
        }
    finally:
        await client.close()


def main() -> None:
    """Entry point."""
    run(
        app,
        {
            StoreExistsError: ExitCode.REFUSED,
            StoreError: ExitCode.CONFIG,
            SecureElementError: ExitCode.FAILED,
            CardFormatError: ExitCode.DATA,
            AdministratorRefusedError: ExitCode.REFUSED,
            TokenRefusedError: ExitCode.REFUSED,
            TokenUnknownError: ExitCode.DATA,
            RadiusRejectedError: ExitCode.REFUSED,
            PeerRefusedError: ExitCode.REFUSED,
            KeysDifferError: ExitCode.REFUSED,
            ServerNameError: ExitCode.REFUSED,
            RadiusSilenceError: ExitCode.UNAVAILABLE,
            RadiusFormatError: ExitCode.DATA,
            RadiusSecretError: ExitCode.CONFIG,
            TokensFullError: ExitCode.FAILED,
            UserTokenError: ExitCode.DATA,
            CardError: ExitCode.UNAVAILABLE,
            ApduError: ExitCode.FAILED,
        },
    )


if __name__ == "__main__":
    main()
