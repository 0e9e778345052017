"""What commands work on: the cards of the settings, with the keys of their administrator."""

from __future__ import annotations

import asyncio

import typer

from gose.authority import CardAccess
from gose.authority.enrolment import CONNECT_TIMEOUT, STOP_GRID
from gose.authority.errors import EnrolmentError, IssuanceError
from gose.cards import CardWays
from gose.registry import NotEnrolledError
from gose.running import RunningError, ask_running_grid
from gose.settings import GoseSettings, SecureElementSettings
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.identity import Holder, Role, check_name


class UnknownElementError(NotEnrolledError):
    """The settings have no such secure element."""

    def __init__(self, seid: str, role: str, known: str) -> None:
        super().__init__("secure element", seid)
        self.args = (
            f"no secure element '{seid}' is in the settings ([[secure_elements]], seid); those of role {role}: {known}",
        )


def server_names(settings: GoseSettings) -> tuple[str, ...]:
    """What stands in the servers' certificates."""
    return tuple(dict.fromkeys((*settings.names, settings.service_provider_host, settings.openid_provider_host)))


def holder(role: Role, name: str) -> Holder:
    """Raises IdentityError for a name that is none."""
    return Holder(role, check_name(name))


def element_of(settings: GoseSettings, seid: str, role: Role) -> SecureElementSettings:
    """The secure element of that name and role in the settings. Raises NotEnrolledError, IssuanceError."""
    element = settings.secure_element(seid)
    if element is None:
        known = ", ".join(entry.seid for entry in settings.secure_elements if entry.role == role) or "none"
        raise UnknownElementError(seid, role, known)
    if element.role != role:
        raise IssuanceError(f"the secure element '{seid}' has the role '{element.role}' in the settings, not '{role}'")
    return element


def note_missing_card(settings: GoseSettings, seid: str | None) -> None:
    """Says so, on standard error, if a grid runs on this state and does not have that card: its VM could do nothing yet."""
    try:
        grid = asyncio.run(ask_running_grid(settings.state))
    except (RunningError, OSError):
        return
    if grid is None or seid is None or seid in {card.seid for card in grid.cards}:
        return
    if settings.secure_element(seid) is None:
        advice = "add it to the settings, and send the grid SIGHUP"
    else:
        advice = "send it SIGHUP ('systemctl reload gose'), it reads the settings again"
    typer.echo(f"note: the running grid does not have the secure element '{seid}' yet: {advice}", err=True)


def access_to(settings: GoseSettings, element: SecureElementSettings) -> CardAccess:
    """The way to that card for its administrator. Raises EnrolmentError, and what reading the keys raises."""
    if element.administrator_keys_file is None:
        raise EnrolmentError(f"the settings name no 'administrator_keys_file' for the secure element '{element.seid}'")
    ways = CardWays.of(settings)
    return CardAccess.through(
        lambda: ways.connect(element, timeout=CONNECT_TIMEOUT),
        AdministratorKeys.read(element.administrator_keys_file),
        where=f"the card at {element.place}",
        segmentation=element.card_segmentation,
        advice=STOP_GRID,
    )
