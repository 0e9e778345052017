"""``secure-middleware check`` and ``status``: would it work, before the daemon starts and while it runs?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from dom0_middleware.commands.calls import call_daemon
from dom0_middleware.commands.options import DEFAULT_CONFIG, FIRST_ORCHESTRATOR, As, AsJson, Config, Timeout
from dom0_middleware.settings import MiddlewareSettings
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.cli import ExitCode
from secfunet.service.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from dom0_middleware.domain_template import DomainTemplate

PATIENCE = 10.0  # seconds for each step of the look at the grid


def status(
    config: Config = DEFAULT_CONFIG,
    orchestrator: As = FIRST_ORCHESTRATOR,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Ask the running daemon whether an operation would work now, link by link; exit code 69 if not."""
    found = call_daemon(config, orchestrator, lambda stub: stub.GetStatus(pb.GetStatusRequest(), timeout=timeout))
    _show(found.links, works=found.works, as_json=as_json)
    if not found.works:
        raise typer.Exit(ExitCode.UNAVAILABLE)


def check(config: Config = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Try everything that the daemon will need, without starting it: 78 if a setting is wrong, 69 if something is away now."""
    settings = load_settings(MiddlewareSettings, config)
    settings.card.ask_for_pin(f"the hypervisor's card ({settings.card.place})")
    links = [*_files(settings), *asyncio.run(_peers(settings))]
    states = {link.state for link in links}
    works = states <= {pb.LINK_STATE_OK, pb.LINK_STATE_WARNING}
    _show(links, works=works, as_json=as_json)
    if not works:
        raise typer.Exit(ExitCode.CONFIG if pb.LINK_STATE_WRONG in states else ExitCode.UNAVAILABLE)


def _files(settings: MiddlewareSettings) -> Iterator[pb.LinkStatus]:
    from dom0_middleware.guest_authority import GuestAuthority
    from dom0_middleware.orchestrator_authority import OrchestratorAuthority
    from dom0_middleware.policy import PolicyFile
    from dom0_middleware.start_checks import expiries
    from dom0_middleware.status import certificates
    from dom0_middleware.status import status as link
    from secfunet.errors import SecFuNetError

    yield link("settings")
    try:
        lifetime = settings.limits.agent_certificate_lifetime
        GuestAuthority.load(settings.state, clock=time.time, agent_lifetime=lifetime)
        OrchestratorAuthority.load(settings.state, clock=time.time)
    except (SecFuNetError, OSError) as error:
        yield link("state", pb.LINK_STATE_WRONG, f"'state': {error} ('secure-middleware init' makes what is missing)")
    else:
        yield link("state")
        yield certificates(expiries(settings), time.time())
    try:
        rules = load_settings(PolicyFile, settings.policy).rule
    except SettingsError as error:
        yield link("policy", pb.LINK_STATE_WRONG, f"'policy': {error}")
    else:
        yield link("policy") if rules else link("policy", pb.LINK_STATE_WARNING, "no rule: everything is denied")


async def _peers(settings: MiddlewareSettings) -> list[pb.LinkStatus]:
    from dom0_middleware.card import hypervisor_card
    from dom0_middleware.domain_template import DomainTemplate
    from dom0_middleware.errors import SettingUnusable
    from dom0_middleware.start_checks import grid_authority, setting_of
    from dom0_middleware.status import hypervisor_certificate, link_status
    from dom0_middleware.status import status as link
    from gose_client import GoseClient
    from gose_client.trial import LinkState
    from secfunet.errors import SecFuNetError

    found = []
    try:
        template = settings.libvirt.template
        found.append(await _libvirt(settings, DomainTemplate.load(template) if template is not None else None))
    except SettingUnusable as error:
        found.append(link("libvirt", pb.LINK_STATE_WRONG, str(error)))
    try:
        authority = grid_authority(settings.grid.authority, now=time.time())
    except SettingUnusable as error:
        return [*found, link("grid", pb.LINK_STATE_WRONG, str(error))]
    cards = hypervisor_card(settings.card)
    try:
        async with GoseClient(settings.grid, cards) as client:
            for each in await client.look(timeout=PATIENCE):
                shown = link_status(each)
                if each.setting:
                    shown.message = f"'{setting_of(each, settings)}': {each.message}"
                found.append(shown)
                if each.name == "card" and each.state is LinkState.OK:
                    async with cards.lease(timeout=settings.card.timeout) as card:
                        certificate = await card.certificate()
                    found.append(hypervisor_certificate(certificate, authority, time.time()))
    except SecFuNetError as error:
        found.append(link("card", pb.LINK_STATE_AWAY, str(error)))
    finally:
        await cards.close()
    return found


async def _libvirt(settings: MiddlewareSettings, template: DomainTemplate | None) -> pb.LinkStatus:
    from dom0_middleware.errors import Unavailable
    from dom0_middleware.libvirt_hypervisor import LibvirtHypervisor
    from dom0_middleware.status import status as link

    hypervisor = LibvirtHypervisor(settings.libvirt.uri, template=template)
    try:
        await hypervisor.connect(lambda event: None, lambda connected: None)
    except Unavailable as error:
        return link("libvirt", pb.LINK_STATE_AWAY, str(error))
    finally:
        await hypervisor.close()
    return link("libvirt")


def _show(links: Sequence[pb.LinkStatus], *, works: bool, as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "link": link.name,
                "state": _state(link),
                **({"vm": link.vm} if link.vm else {}),
                **({"message": link.message} if link.message else {}),
            }
            for link in links
        ]
        typer.echo(json.dumps({"works": works, "links": rows}, indent=2))
        return
    for link in links:
        name = f"{link.name} {link.vm}".strip()
        typer.echo(f"{_state(link):8} {name:17} {link.message}".rstrip())
    typer.echo("an operation would work now" if works else "an operation would fail now")


def _state(link: pb.LinkStatus) -> str:
    return pb.LinkState.Name(link.state).removeprefix("LINK_STATE_").lower()
