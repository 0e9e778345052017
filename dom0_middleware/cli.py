"""``secure-middleware``: the daemon of a dom0, and the commands that use a running one.

========  =======================================================================
exit code  meaning
========  =======================================================================
0         done; a verified log or a checked policy is sound
1         the operation failed; the message says why
2         wrong arguments
65        the input is not what it should be; the audit log was changed
69        the daemon cannot be reached, or something it needs is not there now
77        not permitted
78        the settings or the policy cannot be used
========  =======================================================================
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid as uuids
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dom0_middleware.audit_verify import Verdict, rotated_files, verify
from dom0_middleware.cloud_init.user_data import CloudInitError
from dom0_middleware.errors import MiddlewareError, Unavailable
from dom0_middleware.orchestrator_authority import OrchestratorAuthority
from dom0_middleware.orchestrator_client import CallInvalid, CallRefused, DaemonUnavailable, orchestrator_stub
from dom0_middleware.policy import PolicyFile
from dom0_middleware.settings import MiddlewareSettings
from dom0_middleware.vm_file import MAX_DEFINITION, DefinitionError, definition_from_json, definition_to_json
from secfunet.errors import SecFuNetError
from secfunet.identity import IdentityError, der_of, load_certificate
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.cli import ExitCode, print_version, run
from secfunet.service.daemon import run_daemon
from secfunet.service.logs import configure_logs
from secfunet.service.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from secfunet.middleware.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub as Stub

FIRST_ORCHESTRATOR = "admin"
DEFAULT_CONFIG = Path("/etc/secfunet/secure-middleware.toml")
MAX_TOKEN_FILE = 16384
Answer = TypeVar("Answer")

app = typer.Typer(
    help="The Secure Middleware: runs in dom0, between the agents of VMs and the grid that holds their keys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
vm_app = typer.Typer(help="Create, start, stop and watch VMs of a running daemon.", no_args_is_help=True)
orchestrator_app = typer.Typer(help="Who may command the daemon.", no_args_is_help=True)
audit_app = typer.Typer(help="The audit log.", no_args_is_help=True)
policy_app = typer.Typer(help="The policy.", no_args_is_help=True)
app.add_typer(vm_app, name="vm")
app.add_typer(orchestrator_app, name="orchestrator")
app.add_typer(audit_app, name="audit")
app.add_typer(policy_app, name="policy")

Config = Annotated[Path, typer.Option("--config", help="Settings (TOML).", dir_okay=False)]
As = Annotated[str, typer.Option("--as", help="The orchestrator whose certificate to use.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait.", min=0.1, max=3600)]
Vm = Annotated[str, typer.Argument(metavar="VM", help="Name or UUID.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the VM-Auth-Token.", dir_okay=False)]


class UnknownVm(SecFuNetError):
    """No VM of that name or UUID."""

    def __init__(self, vm: str) -> None:
        super().__init__(f"there is no VM '{vm}'")
        self.vm = vm


class BadInput(SecFuNetError):
    """A file given on the command line is not what it should be."""


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version("secure-middleware"), is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Runs before every command."""


@app.command()
def init(config: Config = DEFAULT_CONFIG) -> None:
    """Make what is missing: settings, policy, the two authorities of dom0, and the first orchestrator's certificate."""
    from dom0_middleware.initialise import NEXT_STEPS, initialise

    made = initialise(config)
    for path in made:
        typer.echo(f"made {path}")
    policy = load_settings(MiddlewareSettings, config).policy
    if policy in made:
        typer.echo(NEXT_STEPS.format(config=config, policy=policy))


@app.command()
def serve(config: Config = DEFAULT_CONFIG) -> None:
    """Run the daemon until SIGTERM. SIGHUP reads the policy and orchestrators.allowed again and reopens the audit log."""
    from dom0_middleware.grid import run_middleware

    settings = load_settings(MiddlewareSettings, config)
    configure_logs(settings.log_level)

    async def make() -> AbstractAsyncContextManager[object]:
        return run_middleware(
            settings, allowed_again=lambda: load_settings(MiddlewareSettings, config).orchestrators.allowed
        )

    run_daemon(make)


@vm_app.command("create")
def vm_create(
    name: Annotated[str, typer.Option("--name", help="1 to 64 characters of [A-Za-z0-9._-].")],
    certificate: Annotated[Path, typer.Option("--certificate", help="The VMID, PEM.", exists=True, dir_okay=False)],
    token_file: TokenFile = None,
    memory: Annotated[int, typer.Option("--memory", help="MiB; 0: the default.", min=0)] = 0,
    vcpus: Annotated[int, typer.Option("--vcpus", help="0: the default.", min=0)] = 0,
    address: Annotated[
        str, typer.Option("--address", help="The VM's IP address; needed where the channel is tcp.")
    ] = "",
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Define a domain and bind it to a VMID."""
    try:
        vmid = der_of(load_certificate(certificate.read_bytes()))
    except IdentityError as error:
        raise BadInput(f"{certificate}: {error}") from None
    request = pb.CreateVmRequest(
        name=name,
        vm_certificate=vmid,
        vm_auth_token=_token(token_file),
        memory_mib=memory,
        vcpus=vcpus,
        address=address,
    )
    response = _call(config, orchestrator, lambda stub: stub.CreateVm(request, timeout=timeout))
    _show([response.vm], as_json=as_json)


@vm_app.command("start")
def vm_start(
    vm: Vm,
    token_file: TokenFile = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Make the domain's channel, hand it a join secret, and boot it. A VM that runs already only takes a new token."""

    token = _token(token_file)

    def start(stub: Stub, uuid: str) -> Awaitable[pb.StartVmResponse]:
        return stub.StartVm(pb.StartVmRequest(uuid=uuid, vm_auth_token=token), timeout=timeout)

    response = _call_for(vm, config, orchestrator, timeout, start)
    if as_json:
        typer.echo(json.dumps({**_fields(response.vm), "guest_channel": response.guest_channel}, indent=2))
        return
    _show([response.vm], as_json=False)
    if response.guest_channel:
        typer.echo(f"channel: {response.guest_channel}")


@vm_app.command("stop")
def vm_stop(
    vm: Vm,
    force: Annotated[bool, typer.Option("--force", help="Destroy the domain instead of asking it.")] = False,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 60.0,
) -> None:
    """Stop the domain; its agent's certificate and its session end at once."""

    def stop(stub: Stub, uuid: str) -> Awaitable[pb.StopVmResponse]:
        return stub.StopVm(pb.StopVmRequest(uuid=uuid, force=force), timeout=timeout)

    _show([_call_for(vm, config, orchestrator, timeout, stop).vm], as_json=as_json)


@vm_app.command("list")
def vm_list(
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """All VMs."""
    response = _call(config, orchestrator, lambda stub: stub.ListVms(pb.ListVmsRequest(), timeout=timeout))
    _show(response.vms, as_json=as_json)


@vm_app.command("show")
def vm_show(
    vm: Vm,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """One VM."""

    def show(stub: Stub, uuid: str) -> Awaitable[pb.GetVmResponse]:
        return stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=timeout)

    found = _call_for(vm, config, orchestrator, timeout, show).vm
    if as_json:
        typer.echo(json.dumps(_fields(found), indent=2))
    else:
        for key, value in _fields(found).items():
            typer.echo(f"{key:17} {value}")


@vm_app.command("delete")
def vm_delete(
    vm: Vm, config: Config = DEFAULT_CONFIG, orchestrator: As = FIRST_ORCHESTRATOR, timeout: Timeout = 30.0
) -> None:
    """Undefine a stopped VM and forget its binding."""

    def delete(stub: Stub, uuid: str) -> Awaitable[pb.DeleteVmResponse]:
        return stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=timeout)

    _call_for(vm, config, orchestrator, timeout, delete)


@vm_app.command("revoke")
def vm_revoke(
    vm: Vm,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Take the VM's right to its key on this hypervisor, at once and for good."""

    def revoke(stub: Stub, uuid: str) -> Awaitable[pb.RevokeVmResponse]:
        return stub.RevokeVm(pb.RevokeVmRequest(uuid=uuid), timeout=timeout)

    _show([_call_for(vm, config, orchestrator, timeout, revoke).vm], as_json=as_json)


@vm_app.command("export")
def vm_export(
    vm: Vm,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write in place of standard output.", dir_okay=False)
    ] = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    timeout: Timeout = 30.0,
) -> None:
    """Say what another host needs to know of a VM before it can come there (JSON; nothing secret)."""

    def show(stub: Stub, uuid: str) -> Awaitable[pb.GetVmResponse]:
        return stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=timeout)

    text = definition_to_json(_call_for(vm, config, orchestrator, timeout, show).definition)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="ascii")


@vm_app.command("expect")
def vm_expect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'vm export' wrote.", exists=True, dir_okay=False)],
    token_file: TokenFile = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Make this host ready for a VM of another one. The token, for this host's hypervisor, may come later ('vm start')."""
    try:
        with file.open("rb") as content:
            asked = definition_from_json(content.read(MAX_DEFINITION + 1))
    except DefinitionError as error:
        raise BadInput(f"{file}: {error}") from None
    request = pb.ExpectVmRequest(definition=asked, vm_auth_token=_token(token_file))
    response = _call(config, orchestrator, lambda stub: stub.ExpectVm(request, timeout=timeout))
    _show([response.vm], as_json=as_json)


@vm_app.command("migrate")
def vm_migrate(
    vm: Vm,
    destination: Annotated[str, typer.Option("--to", metavar="NAME", help="A destination of this host's settings.")],
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 900.0,
) -> None:
    """Send a running VM to another host, live. Its agent's certificate and its session end here first."""

    def migrate(stub: Stub, uuid: str) -> Awaitable[pb.MigrateVmResponse]:
        return stub.MigrateVm(pb.MigrateVmRequest(uuid=uuid, destination=destination), timeout=timeout)

    _show([_call_for(vm, config, orchestrator, timeout, migrate).vm], as_json=as_json)


@vm_app.command("user-data")
def vm_user_data(
    vm: Vm,
    package: Annotated[
        list[Path] | None,
        typer.Option("--package", help="A Debian package that travels on the seed (repeatable).", dir_okay=False),
    ] = None,
    package_url: Annotated[
        list[str] | None,
        typer.Option("--package-url", help="URL#sha256=DIGEST: one that the guest fetches (repeatable)."),
    ] = None,
    seed: Annotated[
        Path | None, typer.Option("--seed", help="Write a NoCloud seed (ISO image) here.", dir_okay=False)
    ] = None,
    network_config: Annotated[
        Path | None,
        typer.Option("--network-config", help="For the seed: cloud-init's, as you wrote it.", dir_okay=False),
    ] = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    timeout: Timeout = 30.0,
) -> None:
    """Make the cloud-init user data that installs the agent and has it enrol: on standard output, or on a seed. No secret is in it."""
    from dom0_middleware.cloud_init.seed import PackageFile, write_seed
    from dom0_middleware.cloud_init.user_data import Package, user_data

    if seed is None and (package or network_config is not None):
        raise BadInput("--package and --network-config need a seed to travel on: name it with --seed")
    files = [PackageFile.read(path) for path in package or ()]
    fetched = [Package.from_url(text) for text in package_url or ()]

    def get(stub: Stub, uuid: str) -> Awaitable[pb.GetVmResponse]:
        return stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=timeout)

    found = _call_for(vm, config, orchestrator, timeout, get).vm
    if seed is None:
        typer.echo(user_data(fetched), nl=False)
        return
    write_seed(seed, uuid=found.uuid, name=found.name, files=files, fetched=fetched, network=network_config)
    typer.echo(f"made {seed}")


@vm_app.command("watch")
def vm_watch(config: Config = DEFAULT_CONFIG, orchestrator: As = FIRST_ORCHESTRATOR, as_json: AsJson = False) -> None:
    """Show what happens to VMs, from now on, a line an event; until interrupted."""

    async def watch(stub: Stub) -> None:
        async for event in stub.WatchEvents(pb.WatchEventsRequest()):
            kind = pb.VmEventKind.Name(event.kind).removeprefix("VM_EVENT_KIND_").lower()
            if as_json:
                typer.echo(json.dumps({"time": event.time, "event": kind, "vm": _fields(event.vm)}))
            else:
                typer.echo(f"{_time(event.time)}  {kind:9}  {event.vm.name}  {event.vm.uuid}")

    try:
        _call(config, orchestrator, watch)
    except KeyboardInterrupt:
        raise typer.Exit from None


@orchestrator_app.command("add")
def orchestrator_add(name: Annotated[str, typer.Argument(metavar="NAME")], config: Config = DEFAULT_CONFIG) -> None:
    """Make a key and a certificate for NAME."""
    settings = load_settings(MiddlewareSettings, config)
    path = OrchestratorAuthority.load(settings.state, clock=time.time).add(name)
    typer.echo(f"made {path} and its key beside it")
    if name not in settings.orchestrators.allowed:
        typer.echo(f"note: '{name}' is not in orchestrators.allowed of {config}: its calls are refused", err=True)


@audit_app.command("verify")
def audit_verify(
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="A log file (repeatable, oldest first); default: the log of the settings."),
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Find changed, missing and reordered records, and a tail that is gone."""
    if file:
        # The last one given may be the live log: then its anchor lies beside it.
        missing = [path for path in file if not path.is_file()]
        if missing:
            raise BadInput(f"{missing[0]} cannot be read")
        verdict = verify(file, anchor_of=file[-1])
    else:
        log = load_settings(MiddlewareSettings, config).audit_file
        verdict = verify(rotated_files(log) or [log], anchor_of=log)
    _show_verdict(verdict, as_json=as_json)
    if not verdict.sound:
        raise typer.Exit(ExitCode.DATA)


@policy_app.command("check")
def policy_check(
    file: Annotated[
        Path | None, typer.Option("--file", help="A policy file; default: that of the settings.", dir_okay=False)
    ] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Say whether a policy file is valid; every problem at once."""
    path = file or load_settings(MiddlewareSettings, config).policy
    try:
        rules = load_settings(PolicyFile, path).rule
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(ExitCode.CONFIG) from None
    typer.echo(f"{path} is valid: {len(rules)} rules" + ("" if rules else "; everything is denied"))


def _call(config: Path, orchestrator: str, act: Callable[[Stub], Awaitable[Answer]]) -> Answer:
    settings = load_settings(MiddlewareSettings, config)

    async def call() -> Answer:
        async with orchestrator_stub(settings, orchestrator) as stub:
            return await act(stub)

    return asyncio.run(call())


def _call_for(
    vm: str, config: Path, orchestrator: str, timeout: float, act: Callable[[Stub, str], Awaitable[Answer]]
) -> Answer:
    """``act`` with the UUID of the VM that was named."""

    async def call(stub: Stub) -> Answer:
        return await act(stub, await _uuid(stub, vm, timeout))

    return _call(config, orchestrator, call)


async def _uuid(stub: Stub, vm: str, timeout: float) -> str:
    """A VM's UUID, by its name (first) or its UUID."""
    vms = (await stub.ListVms(pb.ListVmsRequest(), timeout=timeout)).vms
    for found in vms:
        if found.name == vm:
            return found.uuid
    try:
        wanted = str(uuids.UUID(vm))
    except ValueError:
        raise UnknownVm(vm) from None
    if all(found.uuid != wanted for found in vms):
        raise UnknownVm(vm)
    return wanted


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open("rb") as file:
        content = file.read(MAX_TOKEN_FILE + 1)
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token or len(content) > MAX_TOKEN_FILE:
        raise BadInput(f"{path} holds no VM-Auth-Token")
    return token


def _fields(vm: pb.Vm) -> dict[str, object]:
    return {
        "uuid": vm.uuid,
        "name": vm.name,
        "state": pb.VmState.Name(vm.state).removeprefix("VM_STATE_").lower(),
        "vmid": vm.vmid,
        "enrolled": vm.enrolled,
        "revoked": vm.revoked,
        "authorised_until": vm.authorised_until,
    }


def _show(vms: Sequence[pb.Vm], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_fields(vm) for vm in vms], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "uuid", "state", "enrolled", "authorised until", "vmid")
    for vm in vms:
        fields = _fields(vm)
        right = "revoked" if vm.revoked else _time(vm.authorised_until) if vm.authorised_until else "no token"
        table.add_row(vm.name, vm.uuid, str(fields["state"]), "yes" if vm.enrolled else "no", right, vm.vmid)
    console = Console()
    # A pipe has no width: nothing is to be folded there.
    (console if console.is_terminal else Console(width=200)).print(table)


def _show_verdict(verdict: Verdict, *, as_json: bool) -> None:
    head = verdict.head
    if as_json:
        problems = [
            {"kind": problem.kind, "file": str(problem.file), "line": problem.line, "message": problem.message}
            for problem in verdict.problems
        ]
        facts = {"sound": verdict.sound, "records": verdict.records, "first": verdict.first, "torn": verdict.torn}
        last = {"last": head.n, "head": head.hash} if head else {}
        typer.echo(json.dumps({**facts, **last, "problems": problems}, indent=2))
        return
    for problem in verdict.problems:
        where = f"{problem.file}:{problem.line}" if problem.line else str(problem.file)
        typer.echo(f"{problem.kind}: {where}: {problem.message}", err=True)
    if verdict.torn:
        typer.echo(f"the last line is unfinished ({verdict.torn} bytes): the daemon repairs it when it starts")
    if verdict.sound:
        span = f"{verdict.first} to {head.n}, head {head.hash}" if head else "none"
        typer.echo(f"sound: {verdict.records} records ({span})")


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def main() -> None:
    """Entry point; errors become exit codes (see the module)."""
    run(
        app,
        {
            CallRefused: ExitCode.REFUSED,
            CallInvalid: ExitCode.DATA,
            DaemonUnavailable: ExitCode.UNAVAILABLE,
            Unavailable: ExitCode.UNAVAILABLE,
            BadInput: ExitCode.DATA,
            CloudInitError: ExitCode.DATA,
            MiddlewareError: ExitCode.FAILED,
        },
    )
