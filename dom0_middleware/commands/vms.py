"""``secure-middleware vm``: create, start, stop, move and watch VMs of a running daemon."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dom0_middleware.commands.calls import call_daemon, call_for_vm
from dom0_middleware.commands.options import DEFAULT_CONFIG, FIRST_ORCHESTRATOR, As, AsJson, BadInput, Config, Timeout
from dom0_middleware.vm_file import MAX_DEFINITION, DefinitionError, definition_from_json, definition_to_json
from secfunet.errors import SecFuNetError
from secfunet.identity import IdentityError, der_of, load_certificate
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.cli import tell
from secfunet.service.results import write_result
from secfunet.service.tables import columns, moment

if TYPE_CHECKING:
    from secfunet.middleware.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub as Stub

MAX_TOKEN_FILE = 16384

app = typer.Typer(help="Create, start, stop and watch VMs of a running daemon.", no_args_is_help=True)

Vm = Annotated[str, typer.Argument(metavar="VM", help="Name or UUID.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the VM-Auth-Token.", dir_okay=False)]


@app.command("create")
def create(
    name: Annotated[
        str, typer.Option("--name", help="1 to 64 characters of [A-Za-z0-9._-], the first a letter or digit; no UUID.")
    ],
    certificate: Annotated[
        Path,
        typer.Option("--certificate", help="The VMID, PEM: of 'gose enrol-vm'.", exists=True, dir_okay=False),
    ],
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
    response = call_daemon(config, orchestrator, lambda stub: stub.CreateVm(request, timeout=timeout))
    _show([response.vm], as_json=as_json)


@app.command("start")
def start(
    vm: Vm,
    token_file: TokenFile = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Make the domain's channel, hand it a join secret, and boot it. A VM that runs already only takes a new token."""

    token = _token(token_file)

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.StartVmResponse]:
        return stub.StartVm(pb.StartVmRequest(uuid=uuid, vm_auth_token=token), timeout=timeout)

    response = call_for_vm(vm, config, orchestrator, timeout, ask)
    _say_what_is_broken(config, orchestrator, timeout)
    if as_json:
        typer.echo(json.dumps({**_fields(response.vm), "guest_channel": response.guest_channel}, indent=2))
        return
    _show([response.vm], as_json=False)
    if response.guest_channel:
        typer.echo(f"channel: {response.guest_channel}")


@app.command("invite")
def invite(
    vm: Vm,
    token_file: TokenFile = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Hand a running VM a new join secret, so that its agent enrols anew; its certificate ends. Needs a token that has not expired."""

    token = _token(token_file)

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.InviteVmResponse]:
        return stub.InviteVm(pb.InviteVmRequest(uuid=uuid, vm_auth_token=token), timeout=timeout)

    response = call_for_vm(vm, config, orchestrator, timeout, ask)
    if as_json:
        typer.echo(json.dumps({**_fields(response.vm), "guest_channel": response.guest_channel}, indent=2))
        return
    _show([response.vm], as_json=False)


@app.command("stop")
def stop(
    vm: Vm,
    force: Annotated[bool, typer.Option("--force", help="Destroy the domain instead of asking it.")] = False,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 60.0,
) -> None:
    """Stop the domain; its agent's certificate and its session end at once."""

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.StopVmResponse]:
        return stub.StopVm(pb.StopVmRequest(uuid=uuid, force=force), timeout=timeout)

    _show([call_for_vm(vm, config, orchestrator, timeout, ask).vm], as_json=as_json)


@app.command("list")
def list_all(
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """All VMs."""
    response = call_daemon(config, orchestrator, lambda stub: stub.ListVms(pb.ListVmsRequest(), timeout=timeout))
    _show(response.vms, as_json=as_json)


@app.command("show")
def show_one(
    vm: Vm,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """One VM."""

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.GetVmResponse]:
        return stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=timeout)

    found = call_for_vm(vm, config, orchestrator, timeout, ask).vm
    if as_json:
        typer.echo(json.dumps(_fields(found), indent=2))
    else:
        for key, value in _fields(found).items():
            typer.echo(f"{key:17} {value}")


@app.command("delete")
def delete(
    vm: Vm,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Undefine a stopped VM and forget its binding."""

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.DeleteVmResponse]:
        return stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=timeout)

    also = list(call_for_vm(vm, config, orchestrator, timeout, ask).also_removed)
    tell(
        "\n".join([f"deleted {vm}", *(f"removed with it: {one}" for one in also)]),
        {"also_removed": also},
        as_json=as_json,
    )


@app.command("revoke")
def revoke(
    vm: Vm,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Take the VM's right to its key on this hypervisor, at once and for good."""

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.RevokeVmResponse]:
        return stub.RevokeVm(pb.RevokeVmRequest(uuid=uuid), timeout=timeout)

    _show([call_for_vm(vm, config, orchestrator, timeout, ask).vm], as_json=as_json)


@app.command("export")
def export(
    vm: Vm,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write in place of standard output.", dir_okay=False)
    ] = None,
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    timeout: Timeout = 30.0,
) -> None:
    """Say what another host needs to know of a VM before it can come there (JSON; nothing secret)."""

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.GetVmResponse]:
        return stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=timeout)

    text = definition_to_json(call_for_vm(vm, config, orchestrator, timeout, ask).definition)
    write_result(text.encode("ascii"), out, mode=0o644)


@app.command("expect")
def expect(
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
    response = call_daemon(config, orchestrator, lambda stub: stub.ExpectVm(request, timeout=timeout))
    _show([response.vm], as_json=as_json)


@app.command("migrate")
def migrate(
    vm: Vm,
    destination: Annotated[str, typer.Option("--to", metavar="NAME", help="A destination of this host's settings.")],
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 900.0,
) -> None:
    """Send a running VM to another host, live. Its agent's certificate and its session end here first."""

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.MigrateVmResponse]:
        return stub.MigrateVm(pb.MigrateVmRequest(uuid=uuid, destination=destination), timeout=timeout)

    _show([call_for_vm(vm, config, orchestrator, timeout, ask).vm], as_json=as_json)


@app.command("user-data")
def user_data(
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

    def ask(stub: Stub, uuid: str) -> Awaitable[pb.GetVmResponse]:
        return stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=timeout)

    found = call_for_vm(vm, config, orchestrator, timeout, ask).vm
    if seed is None:
        typer.echo(user_data(fetched), nl=False)
        return
    write_seed(seed, uuid=found.uuid, name=found.name, files=files, fetched=fetched, network=network_config)
    typer.echo(f"made {seed}")


@app.command("watch")
def watch(config: Config = DEFAULT_CONFIG, orchestrator: As = FIRST_ORCHESTRATOR, as_json: AsJson = False) -> None:
    """Show what happens to VMs, from now on, a line an event; until interrupted."""

    async def ask(stub: Stub) -> None:
        async for event in stub.WatchEvents(pb.WatchEventsRequest()):
            kind = pb.VmEventKind.Name(event.kind).removeprefix("VM_EVENT_KIND_").lower()
            if as_json:
                typer.echo(json.dumps({"time": event.time, "event": kind, "vm": _fields(event.vm)}))
            else:
                typer.echo(f"{moment(event.time)}  {kind:9}  {event.vm.name}  {event.vm.uuid}")

    try:
        call_daemon(config, orchestrator, ask)
    except KeyboardInterrupt:
        raise typer.Exit from None


def _say_what_is_broken(config: Path, orchestrator: str, timeout: float) -> None:
    """The VM was started; whether its key can be used from here now is another matter, and better learnt here than in the guest."""
    try:
        found = call_daemon(config, orchestrator, lambda stub: stub.GetStatus(pb.GetStatusRequest(), timeout=timeout))
    except SecFuNetError as error:
        typer.echo(f"note: the daemon does not say whether the VM can use its key now: {error}", err=True)
        return
    working = (pb.LINK_STATE_OK, pb.LINK_STATE_WARNING)
    for link in found.links:
        if link.state not in working and not link.vm:
            typer.echo(f"note: the VM cannot use its key now: {link.name}: {link.message}", err=True)


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
        "agent_connected": vm.agent_connected,
        "agent_since": vm.agent_since,
        "channel_refused": vm.channel_refused,
        "revoked": vm.revoked,
        "authorised_until": vm.authorised_until,
        "token_ends_soon": vm.token_ends_soon,
    }


def _show(vms: Sequence[pb.Vm], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_fields(vm) for vm in vms], indent=2))
        return
    rows = []
    for vm in vms:
        right = "revoked" if vm.revoked else moment(vm.authorised_until) if vm.authorised_until else "no token"
        if vm.token_ends_soon:
            right += " (renew it)"
        enrolled = "yes" if vm.enrolled else "no"
        rows.append((vm.name, vm.uuid, str(_fields(vm)["state"]), enrolled, _agent(vm), right, vm.vmid))
    typer.echo(columns(("NAME", "UUID", "STATE", "ENROLLED", "AGENT", "AUTHORISED UNTIL", "VMID"), rows))


def _agent(vm: pb.Vm) -> str:
    if vm.channel_refused:
        return f"channel closed: {vm.channel_refused}"
    if not vm.agent_since:
        return "-"
    return f"{'connected' if vm.agent_connected else 'away'} since {moment(vm.agent_since)}"
