"""``gose bind-vm`` and ``gose unbind-vm``: whether a VM's card seals its results itself, and for whom."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from gose.authority import AuthorityFolder
from gose.authority.binding import bind
from gose.authority.ledger import Action, AuthorityRecord
from gose.commands.options import CONFIG, ConfigOption
from gose.commands.resources import access_to, element_of
from gose.registry import Identity, Registry, open_registry
from gose.settings import GoseSettings
from secfunet.container import ContainerProfile
from secfunet.identity import Role
from secfunet.service.cli import JsonOption, tell
from secfunet.service.settings import load_settings

app = typer.Typer()


@app.command("bind-vm")
def bind_vm(
    name: str,
    hypervisor: Annotated[str, typer.Option(help="Name of the hypervisor that alone is to read the VM's results.")],
    as_json: JsonOption = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Have the VM's card seal its results itself, for that hypervisor only; again: for another one. Then issue a new token."""
    settings = load_settings(GoseSettings, config)
    with open_registry(settings.database) as registry:
        recipient = registry.named(Role.HYPERVISOR, hypervisor)
        _bind(settings, registry, name, recipient)
    said = f"the card of {name} is bound to {hypervisor}: earlier tokens are no longer valid; issue a new one"
    tell(said, {"vm": name, "hypervisor": hypervisor}, as_json=as_json)


@app.command("unbind-vm")
def unbind_vm(name: str, as_json: JsonOption = False, config: ConfigOption = CONFIG) -> None:
    """Have the service provider seal the VM's results again. Then issue a new token."""
    settings = load_settings(GoseSettings, config)
    with open_registry(settings.database) as registry:
        _bind(settings, registry, name, None)
    said = f"the card of {name} is not bound any more: issue a new token"
    tell(said, {"vm": name, "hypervisor": None}, as_json=as_json)


def _bind(settings: GoseSettings, registry: Registry, name: str, hypervisor: Identity | None) -> None:
    vm = registry.named(Role.VM, name)
    element = element_of(settings, vm.seid or "", Role.VM)
    profile = ContainerProfile.named(settings.container_profile)
    access = access_to(settings, element)
    ledger = AuthorityFolder(settings.authority).ledger
    action = Action.UNBIND if hypervisor is None else Action.BIND
    with ledger.attempt(AuthorityRecord(action, "failed", role=Role.VM, name=name)):
        asyncio.run(
            bind(
                vm,
                hypervisor,
                element.label,
                access,
                registry,
                profile=profile,
                now=time.time(),
                record=ledger.record,
            )
        )
