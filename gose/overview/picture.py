"""The picture: what is enrolled, issued and revoked, and how the cards and a running grid are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from gose.authority.folder import AuthorityFolder
from gose.cards import CardWays
from gose.overview.standing import (
    Standing,
    open_places,
    standing_of_identity,
    standing_of_session,
    standing_of_token,
)
from gose.racs.tls import TlsFilesError
from gose.registry import Identity, Registry, Revocation, Token
from gose.running import RunningCard, RunningGrid, RunningSession, ask_running_grid
from gose.settings import GoseSettings, SecureElementSettings
from gose.slots.slot import SlotState
from secfunet.card.errors import CardBusyError, CardError
from secfunet.identity import Role
from secfunet.service.files import UnsafeFileError

CARD_TIMEOUT: Final = 2.0
"""Seconds that a card has to answer."""
CARDS_AT_ONCE: Final = 32


class CardState(StrEnum):
    """What a card's socket does."""

    ANSWERS = "answers"  # free: it gave its answer to reset
    IN_USE = "in use"  # it serves another client: the running grid, most often
    GONE = "gone"  # nobody answers
    # What a running grid says of a card that it has; it is not asked itself then.
    CONNECTING = "connecting"
    IN_SERVICE = "in service"
    OUT_OF_SERVICE = "out of service"


_IN_A_SLOT: Final = {
    SlotState.CONNECTING.value: CardState.CONNECTING,
    SlotState.IN_SERVICE.value: CardState.IN_SERVICE,
}


@dataclass(frozen=True)
class CardReport:
    """One secure element of the settings, and the holder of the key in it (None: not enrolled).

    ``running``: what a running grid says of it (None: none runs, or it does not know this card); ``waiting``: jobs in its queue.
    """

    element: SecureElementSettings
    state: CardState
    holder: Identity | None
    running: RunningCard | None = None
    waiting: int | None = None


@dataclass(frozen=True)
class Overview:
    """The whole picture at the time ``now`` (UTC seconds)."""

    now: float
    authority: AuthorityFolder
    cards: tuple[CardReport, ...]
    hypervisors: tuple[Identity, ...]
    vms: tuple[Identity, ...]
    servers: tuple[Identity, ...]
    tokens: tuple[Token, ...]  # those that have not expired
    revocations: tuple[Revocation, ...]
    running: RunningGrid | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)
    """Of tokens by their JTI, of sessions by their names, of identities by their thumbprints."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Whose certificate a thumbprint is, or was."""


async def take_overview(
    settings: GoseSettings, authority: AuthorityFolder, registry: Registry, *, now: float
) -> Overview:
    """Asks the registry, the running grid, and every card that no running grid has for a sign of life."""
    limit = asyncio.Semaphore(CARDS_AT_ONCE)
    grid = await ask_running_grid(settings.state)
    ways = CardWays.of(settings)
    running = {card.seid: card for card in grid.cards} if grid is not None else {}

    async def ask(element: SecureElementSettings) -> CardState:
        if element.seid in running:
            return _IN_A_SLOT.get(running[element.seid].state, CardState.OUT_OF_SERVICE)
        async with limit:
            return await card_state(element, ways)

    def report(element: SecureElementSettings, state: CardState) -> CardReport:
        card = running.get(element.seid)
        waiting = grid.queues.get(card.queue) if grid is not None and card is not None else None
        return CardReport(element, state, registry.in_secure_element(element.seid), card, waiting)

    states = await asyncio.gather(*map(ask, settings.secure_elements))
    tokens = registry.tokens(unexpired_at=now)
    sessions = grid.sessions if grid is not None else ()
    identities = [one for role in (Role.HYPERVISOR, Role.VM, Role.SERVER) for one in registry.identities(role)]
    with open_places(settings.state) as places:
        standings = {
            **{token.jti: standing_of_token(registry, places, token, now) for token in tokens},
            **{session.name: standing_of_session(registry, session, now) for session in sessions},
            **{identity.thumbprint: standing_of_identity(identity, now) for identity in identities},
        }
    rights: list[Token | RunningSession] = [*tokens, *sessions]
    holders = {one for right in rights for one in (right.vmid, right.hvid)}
    return Overview(
        now=now,
        authority=authority,
        cards=tuple(report(element, state) for element, state in zip(settings.secure_elements, states, strict=True)),
        hypervisors=tuple(one for one in identities if one.role is Role.HYPERVISOR),
        vms=tuple(one for one in identities if one.role is Role.VM),
        servers=tuple(one for one in identities if one.role is Role.SERVER),
        tokens=tokens,
        revocations=registry.revocations(),
        running=grid,
        standings=standings,
        names={thumbprint: registry.name_of(thumbprint) or thumbprint for thumbprint in holders},
    )


async def card_state(element: SecureElementSettings, ways: CardWays) -> CardState:
    """Connects, powers the card on and off again."""
    try:
        port = await ways.connect(element, timeout=CARD_TIMEOUT)
    except CardBusyError:
        return CardState.IN_USE
    except (CardError, TlsFilesError, UnsafeFileError, OSError):
        return CardState.GONE
    await port.close()
    return CardState.ANSWERS
