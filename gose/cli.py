"""``gose``: the commands of a grid's administrator, and the grid itself (``gose serve``).

Exit codes are those of ``secfunet.service.cli``: 1 failed, 65 something named is not known, 69 a card cannot be reached now, 77
refused, 78 the settings or the authority cannot be used.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gose.authority import AuthorityFolder, CardAccess, EnrolmentOrder, create_authority, enrol, sign_request
from gose.authority.binding import bind
from gose.authority.enrolment import CONNECT_TIMEOUT
from gose.authority.errors import (
    AuthorityDamagedError,
    AuthorityExistsError,
    AuthorityMissingError,
    EnrolmentError,
    IssuanceError,
    TokenNotIssuedError,
)
from gose.cards import CardWays
from gose.racs.cli import racs_app
from gose.racs.tls import TlsFilesError
from gose.registry import AlreadyEnrolledError, Identity, NotEnrolledError, Registry, open_registry
from gose.settings import GoseSettings, SecureElementSettings
from gose.users_cli import user_app
from secfunet.apdu import ApduError
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.errors import CardBusyError, CardError, CardFormatError, CardGoneError
from secfunet.card.parameters import KeyAlgorithm
from secfunet.card.place import parse_place
from secfunet.card.readers import show_readers
from secfunet.container import ContainerProfile
from secfunet.identity import Holder, IdentityError, Role, check_name, pem_of
from secfunet.operation import OPERATIONS
from secfunet.racs.errors import RacsRefusedError
from secfunet.racs.inventory import ServerUnreachableError
from secfunet.service.cli import ExitCode, print_version, run
from secfunet.service.credentials import NoCredentialsError
from secfunet.service.daemon import run_daemon
from secfunet.service.files import write_atomically
from secfunet.service.logs import configure_logs
from secfunet.service.settings import load_settings

_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_ALGORITHMS: Final = {
    "rsa-2048": KeyAlgorithm.RSA_2048,
    "rsa-3072": KeyAlgorithm.RSA_3072,
    "rsa-4096": KeyAlgorithm.RSA_4096,
    "p-256": KeyAlgorithm.P_256,
    "p-384": KeyAlgorithm.P_384,
}

app = typer.Typer(
    help="A Grid of Secure Elements: its authority, and the service itself.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
revoke_app = typer.Typer(
    help="Revoke a token, or everything of a VM, a hypervisor or a server, at once.", no_args_is_help=True
)
app.add_typer(revoke_app, name="revoke")
app.add_typer(racs_app, name="racs")
app.add_typer(user_app, name="user")


def parse_duration(text: str) -> float:
    """``90s``, ``30m``, ``8h`` or ``365d`` in seconds; anything else is a usage error."""
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter("a duration is a number and s, m, h or d: 90s, 30m, 8h, 365d")
    return float(int(match[1]) * _SECONDS[match[2]])


def parse_algorithm(text: str) -> KeyAlgorithm:
    """The key algorithm of that name; anything else is a usage error."""
    if text not in _ALGORITHMS:
        raise typer.BadParameter(f"a key is one of {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[text]


def parse_operations(text: str) -> tuple[str, ...]:
    """``sign,decrypt,encrypt`` or some of them; anything else is a usage error."""
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(OPERATIONS):
        raise typer.BadParameter(f"operations are one or several of {','.join(OPERATIONS)}")
    return names


ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="GOSE_CONFIG", help="The grid's settings (TOML).", show_default=True)
]
SecureElementOption = Annotated[str, typer.Option("--seid", help="The secure element, as the settings name it.")]
KeyOption = Annotated[
    KeyAlgorithm, typer.Option("--key", parser=parse_algorithm, metavar="ALGORITHM", help=", ".join(_ALGORITHMS))
]
ValidOption = Annotated[
    float, typer.Option("--valid", parser=parse_duration, metavar="DURATION", help="How long: 90s, 30m, 8h, 365d.")
]
CertificateOption = Annotated[Path, typer.Option("--out", help="Where to write the certificate (PEM).")]
ReplaceOption = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Destroy the key that is there, and make a new one. The old certificate is worth nothing then.",
    ),
]
CONFIG: Final = Path("gose.toml")


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version("gose"), is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


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
        settings.authority, _server_names(settings), now=time.time(), ca_key=ca_key, tokens=tokens
    )
    with open_registry(settings.database):
        pass
    typer.echo(f"authority made in {authority.path}")
    typer.echo(f"clients trust {authority.ca_path}")


@app.command("renew-servers")
def renew_servers(config: ConfigOption = CONFIG) -> None:
    """Give the service provider and the OpenID provider new certificates, for the names in the settings; then restart the grid."""
    settings = load_settings(GoseSettings, config)
    certificates = AuthorityFolder(settings.authority).renew_servers(_server_names(settings), now=time.time())
    for certificate in certificates:
        typer.echo(
            f"new certificate for {certificate.subject.rfc4514_string()} until {certificate.not_valid_after_utc:%Y-%m-%d}"
        )


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
    config: ConfigOption = CONFIG,
) -> None:
    """Make the card at a socket or in a reader the card of a hypervisor. Its key is RSA: containers are made for it."""
    order = EnrolmentOrder(_holder(Role.HYPERVISOR, name), identity, key, valid, replace=replace)
    access = CardAccess.at(parse_place(card), AdministratorKeys.read(administrator_keys_file))
    _enrol(load_settings(GoseSettings, config), order, access, out)


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
    config: ConfigOption = CONFIG,
) -> None:
    """Enrol the hypervisor whose card lies on another host, by that card's request; 'secure-element install' takes the certificate."""
    settings = load_settings(GoseSettings, config)
    try:
        der = x509.load_pem_x509_csr(request.read_bytes()).public_bytes(Encoding.DER)
    except ValueError as error:
        raise EnrolmentError(f"{request} is no PKCS#10 request: {error}") from None
    order = EnrolmentOrder(_holder(Role.HYPERVISOR, name), "hypervisor", KeyAlgorithm.RSA_2048, valid, replace=replace)
    authority = AuthorityFolder(settings.authority).certificate_authority
    with open_registry(settings.database) as registry:
        identity = sign_request(order, der, authority, registry, clock=time.time)
    _write_certificate(identity, out)


@app.command("enrol-vm")
def enrol_vm(
    name: str,
    seid: SecureElementOption,
    out: CertificateOption,
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    replace: ReplaceOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Allocate a secure element of the grid to a VM."""
    settings = load_settings(GoseSettings, config)
    element = _element(settings, seid, Role.VM)
    order = EnrolmentOrder(_holder(Role.VM, name), element.label, key, valid, seid=seid, replace=replace)
    _enrol(settings, order, _access(settings, element), out)


@app.command("enrol-server")
def enrol_server(
    name: str,
    seid: SecureElementOption,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the certificate (PEM).")] = None,
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    replace: ReplaceOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Make a secure element of the grid one of those that serve the login page, for the names in the settings."""
    settings = load_settings(GoseSettings, config)
    element = _element(settings, seid, Role.SERVER)
    order = EnrolmentOrder(
        _holder(Role.SERVER, name),
        element.label,
        key,
        valid,
        seid=seid,
        server_names=_server_names(settings),
        replace=replace,
    )
    _enrol(settings, order, _access(settings, element), out)


@app.command("enrol-cards")
def enrol_cards(
    out: Annotated[Path, typer.Option("--out", help="Folder for the certificates, NAME.pem.", file_okay=False)],
    key: KeyOption = "rsa-2048",  # type: ignore[assignment]  # typer parses the default, too
    valid: ValidOption = "365d",  # type: ignore[assignment]  # likewise
    config: ConfigOption = CONFIG,
) -> None:
    """Enrol every secure element of the settings that has no certificate in the folder yet, each under its SEID."""
    settings = load_settings(GoseSettings, config)
    for element in settings.secure_elements:
        certificate = out / f"{element.seid}.pem"
        if certificate.exists():
            continue
        if element.role == "server":
            enrol_server(element.seid, element.seid, certificate, key, valid, config=config)
        else:
            enrol_vm(element.seid, element.seid, certificate, key, valid, config=config)


@app.command("bind-vm")
def bind_vm(
    name: str,
    hypervisor: Annotated[str, typer.Option(help="Name of the hypervisor that alone is to read the VM's results.")],
    config: ConfigOption = CONFIG,
) -> None:
    """Have the VM's card seal its results itself, for that hypervisor only; again: for another one. Then issue a new token."""
    settings = load_settings(GoseSettings, config)
    with open_registry(settings.database) as registry:
        recipient = registry.named(Role.HYPERVISOR, hypervisor)
        _bind(settings, registry, name, recipient)
    typer.echo(f"the card of {name} is bound to {hypervisor}: tokens of before are worth nothing, issue a new one")


@app.command("unbind-vm")
def unbind_vm(name: str, config: ConfigOption = CONFIG) -> None:
    """Have the service provider seal the VM's results again. Then issue a new token."""
    settings = load_settings(GoseSettings, config)
    with open_registry(settings.database) as registry:
        _bind(settings, registry, name, None)
    typer.echo(f"the card of {name} is bound to nobody: issue a new token")


@app.command("issue-token")
def issue_token(
    vm: Annotated[str, typer.Option(help="Name of the VM.")],
    hypervisor: Annotated[str, typer.Option(help="Name of the hypervisor that it runs on.")],
    operations: Annotated[str, typer.Option(metavar="LIST", help="Some of sign,decrypt,encrypt.")] = ",".join(
        OPERATIONS
    ),
    valid: ValidOption = "8h",  # type: ignore[assignment]  # likewise
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (mode 0600) in place of standard output.")
    ] = None,
    config: ConfigOption = CONFIG,
) -> None:
    """Issue a VM-Auth-Token: the VM may use its key from that hypervisor, for these operations, until then."""
    allowed = parse_operations(operations)
    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority)
    with open_registry(settings.database) as registry:
        token = authority.token_authority.issue(
            registry,
            vm=vm,
            hypervisor=hypervisor,
            audience=settings.audience,
            operations=allowed,
            now=time.time(),
            valid=valid,
        )
    if out is None:
        typer.echo(token)
    else:
        write_atomically(out, token.encode("ascii") + b"\n", mode=0o600)


@revoke_app.command("token")
def revoke_token(jti: str, config: ConfigOption = CONFIG) -> None:
    """Revoke one VM-Auth-Token; 'gose status' lists the JTIs."""
    with open_registry(load_settings(GoseSettings, config).database) as registry:
        registry.revoke_token(jti)
    typer.echo(f"token {jti} is revoked")


def _revoker(role: Role) -> Callable[[str, Path], None]:
    def revoke(name: str, config: ConfigOption = CONFIG) -> None:
        with open_registry(load_settings(GoseSettings, config).database) as registry:
            revocations = registry.revoke_identity(role, name)
        for revocation in revocations:
            typer.echo(f"{role} {name}: {revocation.value} is revoked")

    revoke.__doc__ = f"Revoke every certificate of a {role}: its tokens and sessions fall with it."
    return revoke


for _role in (Role.HYPERVISOR, Role.VM, Role.SERVER):
    revoke_app.command(_role.value)(_revoker(_role))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for a program.")] = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Show the running grid (cards, queues, sessions), who is enrolled, which tokens are out, and what was revoked."""
    from gose.overview import take_overview

    settings = load_settings(GoseSettings, config)
    authority = AuthorityFolder(settings.authority)
    with open_registry(settings.database) as registry:
        overview = asyncio.run(take_overview(settings, authority, registry, now=time.time()))
    typer.echo(json.dumps(overview.as_json(), indent=2) if as_json else overview.as_text())


app.command("readers")(show_readers)


@app.command()
def serve(config: ConfigOption = CONFIG) -> None:
    """Run the grid until SIGTERM: service provider, OpenID provider, and the slots of its cards."""
    # Late: an administrator's commands need not wait for the web server's imports.
    from gose.server import GridService

    settings = load_settings(GoseSettings, config)
    configure_logs(settings.log_level)

    for element in settings.secure_elements:
        element.ask_for_pin(f"{element.seid} ({element.place})")

    async def make_service() -> AbstractAsyncContextManager[object]:
        return GridService(settings)

    run_daemon(make_service)


def main() -> None:
    """The command ``gose``."""
    run(
        app,
        {
            AuthorityExistsError: ExitCode.REFUSED,
            AuthorityMissingError: ExitCode.CONFIG,
            AuthorityDamagedError: ExitCode.CONFIG,
            IssuanceError: ExitCode.DATA,
            IdentityError: ExitCode.DATA,
            NotEnrolledError: ExitCode.DATA,
            AlreadyEnrolledError: ExitCode.REFUSED,
            TokenNotIssuedError: ExitCode.REFUSED,
            NoCredentialsError: ExitCode.CONFIG,
            CardFormatError: ExitCode.DATA,
            CardGoneError: ExitCode.UNAVAILABLE,
            CardBusyError: ExitCode.UNAVAILABLE,
            CardError: ExitCode.FAILED,
            ApduError: ExitCode.FAILED,
            TlsFilesError: ExitCode.CONFIG,
            ServerUnreachableError: ExitCode.UNAVAILABLE,
            RacsRefusedError: ExitCode.REFUSED,
        },
    )


def _server_names(settings: GoseSettings) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*settings.names, settings.service_provider_host, settings.openid_provider_host)))


def _holder(role: Role, name: str) -> Holder:
    return Holder(role, check_name(name))


def _element(settings: GoseSettings, seid: str, role: Role) -> SecureElementSettings:
    element = settings.secure_element(seid)
    if element is None:
        known = ", ".join(entry.seid for entry in settings.secure_elements if entry.role == role) or "none"
        raise NotEnrolledError(f"secure element (in the settings: {known})", seid)
    if element.role != role:
        raise EnrolmentError(f"the secure element '{seid}' has the role '{element.role}' in the settings, not '{role}'")
    return element


def _access(settings: GoseSettings, element: SecureElementSettings) -> CardAccess:
    if element.administrator_keys_file is None:
        raise EnrolmentError(f"the settings name no 'administrator_keys_file' for the secure element '{element.seid}'")
    ways = CardWays.of(settings)
    return CardAccess.through(
        lambda: ways.connect(element, timeout=CONNECT_TIMEOUT),
        AdministratorKeys.read(element.administrator_keys_file),
        where=f"the card at {element.place}",
        segmentation=element.card_segmentation,
    )


def _bind(settings: GoseSettings, registry: Registry, name: str, hypervisor: Identity | None) -> None:
    vm = registry.named(Role.VM, name)
    element = _element(settings, vm.seid or "", Role.VM)
    profile = ContainerProfile.named(settings.container_profile)
    access = _access(settings, element)
    asyncio.run(bind(vm, hypervisor, element.label, access, registry, profile=profile, now=time.time()))


def _enrol(settings: GoseSettings, order: EnrolmentOrder, access: CardAccess, out: Path | None) -> None:
    authority = AuthorityFolder(settings.authority).certificate_authority
    with open_registry(settings.database) as registry:
        identity: Identity = asyncio.run(enrol(order, access, authority, registry, clock=time.time))
    _write_certificate(identity, out)


def _write_certificate(identity: Identity, out: Path | None) -> None:
    if out is not None:
        write_atomically(out, pem_of(identity.certificate), mode=0o644)
    typer.echo(f"{identity.role} {identity.name} is enrolled: {identity.thumbprint}")


if __name__ == "__main__":
    main()
