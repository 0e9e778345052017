"""``vm-agent``: the daemon, and the commands that use it.

========  ==========================================================================
exit code  meaning
========  ==========================================================================
0         done
1         the operation failed, or its answer was refused; the message says why
2         wrong arguments
65        the input is not what it should be (a digest or ciphertext of a wrong size)
69        the agent, dom0 or the grid cannot be reached, is busy, or gave no answer in time: try again
77        not permitted: the socket, the policy of dom0, or the VM-Auth-Token
78        the settings cannot be used
========  ==========================================================================

Results go to standard output: raw bytes into a file or pipe, base64 onto a terminal.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from secfunet.errors import SecFuNetError
from secfunet.service.cli import VERSION_HELP, ExitCode, JsonOption, application, print_version, run
from secfunet.service.daemon import survive_hangup
from secfunet.service.results import opened_input, write_result
from secfunet.service.settings import load_settings
from secfunet.service.tables import moment
from vm_agent.options import ENVIRONMENT
from vm_agent.settings import DEFAULT_CONFIG, DEFAULT_SOCKET, AgentSettings

if TYPE_CHECKING:
    from secfunet.gose.v1 import operation_pb2
    from vm_agent.client import LocalClient

Scheme = TypeVar("Scheme")

HELP = """Let the programs of this VM use a private key that is not in it.

[bold]serve[/] runs the agent; the other commands use a running one over its Unix socket.

Exit codes: 0 done; 1 failed, or the answer was refused; 2 wrong arguments; 65 wrong input; 69 unavailable, try again; 77 not permitted;
78 wrong settings.
"""

app = application(HELP)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="VM_AGENT_CONFIG", help="Settings of the agent (TOML).", show_default=str(DEFAULT_CONFIG)
    ),
]
SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        envvar="VM_AGENT_SOCKET",
        help="The agent's socket; overrides the settings.",
        show_default=str(DEFAULT_SOCKET),
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.01, max=300.0, help="Seconds to wait for the answer.")]
InputArgument = Annotated[str, typer.Argument(metavar="FILE|-", help="What to read; - is standard input.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Write the result to this file instead of standard output.")
]

MAX_SHORT_INPUT = 512  # bytes of a digest, plaintext or ciphertext
_HASHES = {32: "sha256", 48: "sha384", 64: "sha512"}


class CommandError(SecFuNetError):
    """A command failed; the class says with which exit code."""


class InputError(CommandError):
    """What was given is not what the operation takes."""


class UnavailableError(CommandError):
    """Agent, dom0 or grid: try again."""


class RefusedError(CommandError):
    """Not permitted."""


EXIT_CODES: dict[type[SecFuNetError], ExitCode] = {
    InputError: ExitCode.DATA,
    UnavailableError: ExitCode.UNAVAILABLE,
    RefusedError: ExitCode.REFUSED,
    CommandError: ExitCode.FAILED,
}
_BY_STATUS: dict[str, type[CommandError]] = {
    "INVALID_ARGUMENT": InputError,
    "OUT_OF_RANGE": InputError,
    "UNAVAILABLE": UnavailableError,
    "RESOURCE_EXHAUSTED": UnavailableError,
    "DEADLINE_EXCEEDED": UnavailableError,
    "ABORTED": UnavailableError,
    "PERMISSION_DENIED": RefusedError,
    "UNAUTHENTICATED": RefusedError,
}


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version("vm-agent"), is_eager=True, help=VERSION_HELP)
    ] = False,
) -> None:
    pass


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Run the agent until SIGTERM."""
    survive_hangup()  # and so does the program that this process becomes
    path = config or DEFAULT_CONFIG
    options = load_settings(AgentSettings, path).options()
    # The daemon is a process image of its own: it stays for months, and needs nothing of what a command line needs.
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, ENVIRONMENT: options.to_json()}
    os.execve(sys.executable, [sys.executable, "-m", "vm_agent.daemon", str(path)], environment)  # noqa: S606 - no shell, our own module


@app.command()
def check(config: ConfigOption = None, json_: JsonOption = False) -> None:
    """Say whether an agent with these settings would work: folders, group, and what dom0 has handed over to this VM."""
    from secfunet.service.findings import report
    from vm_agent.checks import look

    report(look(load_settings(AgentSettings, config or DEFAULT_CONFIG)), as_json=json_)


@app.command()
def sign(
    file: InputArgument,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="Such as rsassa-pss-sha256; by default what fits the VM's key best.")
    ] = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="FILE is the digest itself (raw bytes), not what to hash.")
    ] = False,
    out: OutOption = None,
    config: ConfigOption = None,
    socket: SocketOption = None,
    timeout: TimeoutOption = 20.0,
) -> None:
    """Sign a file with the VM's key. The file is hashed here; only its digest travels.

    By default RSA keys sign with rsassa-pss-sha256 (openssl dgst -sha256 -sigopt rsa_padding_mode:pss -verify ...), EC keys with ECDSA.
    """
    from secfunet.operation import digest_size, signature_scheme

    chosen = _named(signature_scheme, scheme) if scheme is not None else None
    with _client(config, socket, timeout) as client:
        if chosen is None:
            chosen = _default_scheme(client)
        size = digest_size(chosen)
        value = _read_short(file) if digest else _hash(file, _HASHES[size])
        if len(value) != size:
            raise InputError(f"a digest for this scheme has {size} bytes, this one has {len(value)}")
        _write(client.sign(chosen, value), out)


@app.command()
def decrypt(
    file: InputArgument,
    scheme: Annotated[str, typer.Option("--scheme", help="How it was encrypted.")] = "rsaes-oaep-sha256",
    out: OutOption = None,
    config: ConfigOption = None,
    socket: SocketOption = None,
    timeout: TimeoutOption = 20.0,
) -> None:
    """Decrypt a short message that was encrypted to the VM's RSA key."""
    from secfunet.operation import encryption_scheme

    chosen = _named(encryption_scheme, scheme)
    with _client(config, socket, timeout) as client:
        _write(client.decrypt(chosen, _read_short(file)), out)


@app.command()
def encrypt(
    file: InputArgument,
    scheme: Annotated[str, typer.Option("--scheme", help="How to encrypt it.")] = "rsaes-oaep-sha256",
    out: OutOption = None,
    config: ConfigOption = None,
    socket: SocketOption = None,
    timeout: TimeoutOption = 20.0,
) -> None:
    """Encrypt a short message to the VM's own RSA key."""
    from secfunet.operation import encryption_scheme

    chosen = _named(encryption_scheme, scheme)
    with _client(config, socket, timeout) as client:
        _write(client.encrypt(chosen, _read_short(file)), out)


@app.command()
def identity(
    pem: Annotated[bool, typer.Option("--pem", help="Only the VM's certificate, PEM.")] = False,
    json_: JsonOption = False,
    config: ConfigOption = None,
    socket: SocketOption = None,
    timeout: TimeoutOption = 20.0,
) -> None:
    """Show who this VM is."""
    from secfunet.identity import pem_of

    with _client(config, socket, timeout) as client:
        found = client.identity()
    certificate = pem_of(found.vm_certificate).decode()
    if json_:
        facts = {
            "vmid": found.vmid,
            "operations": list(found.operations),
            "authorised_until": found.authorised_until,
            "certificate": certificate,
        }
        typer.echo(json.dumps(facts, indent=2))
    elif pem:
        typer.echo(certificate, nl=False)
    else:
        typer.echo(f"VMID              {found.vmid}")
        typer.echo(f"operations        {', '.join(found.operations) or 'none'}")
        typer.echo(f"authorised until  {moment(found.authorised_until)}")


@app.command()
def status(
    json_: JsonOption = False,
    config: ConfigOption = None,
    socket: SocketOption = None,
    timeout: TimeoutOption = 20.0,
) -> None:
    """Show how the agent is, and asks along the whole chain, to the VM's card: exit code 69 if an operation would fail now."""
    with _client(config, socket, timeout) as client:
        found = client.status(probe=True)
    if json_:
        facts = {
            "version": found.version,
            "enrolled": found.enrolled,
            "connected": found.connected,
            "transport": found.transport,
            "certificate_expires_at": found.certificate_expires_at,
            "works": found.works,
            "broken_link": found.broken_link,
            "reason": found.reason,
            "problem": found.problem,
        }
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(f"version           {found.version}")
        typer.echo(f"enrolled          {'yes' if found.enrolled else 'no'}")
        typer.echo(f"connected         {'yes' if found.connected else 'no'}")
        typer.echo(f"transport         {found.transport or 'none yet'}")
        typer.echo(f"certificate until {moment(found.certificate_expires_at)}")
        typer.echo(f"operations        {'work' if found.works else 'fail'}")
        if found.broken_link:
            typer.echo(f"broken link       {found.broken_link} ({found.reason})")
        if found.problem:
            typer.echo(f"problem           {found.problem}")
    if not found.works:
        raise typer.Exit(ExitCode.UNAVAILABLE)


@contextlib.contextmanager
def _client(config: Path | None, socket: Path | None, timeout: float) -> Iterator[LocalClient]:
    from vm_agent.client import LocalClient
    from vm_agent.errors import AgentError

    if socket is None:
        if config is not None:
            socket = load_settings(AgentSettings, config).socket
        elif os.access(DEFAULT_CONFIG, os.R_OK):
            socket = load_settings(AgentSettings, DEFAULT_CONFIG).socket
        else:
            socket = DEFAULT_SOCKET
    try:
        with LocalClient(socket, timeout=timeout) as client:
            yield client
    except AgentError as error:
        raise _BY_STATUS.get(error.code.name, CommandError)(str(error)) from error


def _named(find: Callable[[str], Scheme], name: str) -> Scheme:
    from secfunet.operation import OperationError

    try:
        return find(name)
    except OperationError as error:
        raise typer.BadParameter(str(error), param_hint="--scheme") from error


def _default_scheme(client: LocalClient) -> operation_pb2.SignatureScheme:
    from cryptography.hazmat.primitives.asymmetric import ec

    from secfunet.identity import load_certificate
    from secfunet.operation import signature_scheme

    key = load_certificate(client.identity().vm_certificate).public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return signature_scheme("ecdsa-sha384" if key.curve.key_size > 256 else "ecdsa-sha256")
    return signature_scheme("rsassa-pss-sha256")


def _hash(file: str, name: str) -> bytes:
    """In pieces: a file may be larger than the memory."""
    hasher = hashlib.new(name)
    with opened_input(file) as stream:
        while piece := stream.read(1 << 18):
            hasher.update(piece)
    return hasher.digest()


def _read_short(file: str) -> bytes:
    with opened_input(file) as stream:
        content = stream.read(MAX_SHORT_INPUT + 1)
    if not 0 < len(content) <= MAX_SHORT_INPUT:
        raise InputError(f"the input must have 1 to {MAX_SHORT_INPUT} bytes")
    return content


def _write(result: bytes, out: Path | None) -> None:
    if out is None and sys.stdout is not None and sys.stdout.isatty():
        typer.echo(base64.b64encode(result).decode())
    else:
        write_result(result, out)


def main() -> None:
    """Entry point of ``vm-agent``."""
    run(app, EXIT_CODES)
