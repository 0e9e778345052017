"""What ``gose status`` shows: who is enrolled, which cards answer, which tokens are out, what was revoked; and how a running grid is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from gose.authority.folder import AuthorityFolder
from gose.cards import CardWays
from gose.racs.tls import TlsFilesError
from gose.registry import Identity, Registry, Revocation, Token
from gose.running import RunningCard, RunningGrid, ask_running_grid
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

    def as_json(self) -> dict[str, Any]:
        """For machines; times are UTC seconds."""
        return {
            "time": math.floor(self.now),
            "authority": {
                "folder": str(self.authority.path),
                "token_issuer": self.authority.token_issuer,
                "ca_expires_at": math.floor(self.authority.ca_certificate.not_valid_after_utc.timestamp()),
            },
            "running": None
            if self.running is None
            else {
                "pid": self.running.pid,
                "version": self.running.version,
                "started_at": math.floor(self.running.started_at),
                "streams": self.running.streams,
                "queues": self.running.queues,
                "sessions": [
                    {
                        "name": session.name,
                        "vmid": session.vmid,
                        "hvid": session.hvid,
                        "seid": session.seid,
                        "operations": list(session.operations),
                        "created_at": math.floor(session.created_at),
                        "expires_at": math.floor(session.expires_at),
                    }
                    for session in self.running.sessions
                ],
            },
            "secure_elements": [
                {
                    "seid": card.element.seid,
                    "role": card.element.role,
                    "place": card.element.place,
                    "state": card.state.value,
                    "holder": None if card.holder is None else card.holder.name,
                    "cause": "" if card.running is None else card.running.cause,
                    "waiting": card.waiting,
                    "jobs_done": None if card.running is None else card.running.jobs_done,
                }
                for card in self.cards
            ],
            "hypervisors": [_identity(identity) for identity in self.hypervisors],
            "vms": [_identity(identity) for identity in self.vms],
            "servers": [_identity(identity) for identity in self.servers],
            "tokens": [
                {
                    "jti": token.jti,
                    "vmid": token.vmid,
                    "hvid": token.hvid,
                    "operations": sorted(token.operations),
                    "issued_at": math.floor(token.issued_at),
                    "expires_at": math.floor(token.expires_at),
                    "revoked_at": _whole(token.revoked_at),
                }
                for token in self.tokens
            ],
            "revocations": [
                {
                    "kind": revocation.kind.value,
                    "name": revocation.name,
                    "value": revocation.value,
                    "revoked_at": math.floor(revocation.revoked_at),
                }
                for revocation in self.revocations
            ],
        }

    def as_text(self) -> str:
        """For people; times are UTC."""
        names = {identity.thumbprint: identity.name for identity in (*self.vms, *self.hypervisors)}
        parts = [
            f"authority: {self.authority.path}, CA until {_day(self.authority.ca_certificate.not_valid_after_utc.timestamp())}",
            self._grid(),
            _table(
                "secure elements",
                ("SEID", "ROLE", "CARD", "HOLDER", "WAITING", "DONE", "PLACE", "CAUSE"),
                (
                    (
                        card.element.seid,
                        card.element.role,
                        card.state.value,
                        card.holder.name if card.holder else "-",
                        "-" if card.waiting is None else str(card.waiting),
                        "-" if card.running is None else str(card.running.jobs_done),
                        card.element.place,
                        self._cause(card),
                    )
                    for card in self.cards
                ),
            ),
            *self._sessions(names),
            self._identities("hypervisors", "HVID", self.hypervisors),
            self._identities("VMs", "VMID", self.vms),
            self._identities("servers", "THUMBPRINT", self.servers),
            _table(
                "tokens",
                ("JTI", "VM", "HYPERVISOR", "OPERATIONS", "UNTIL", "STANDING"),
                (
                    (
                        token.jti,
                        names.get(token.vmid, token.vmid),
                        names.get(token.hvid, token.hvid),
                        ",".join(sorted(token.operations)),
                        _minute(token.expires_at),
                        "good" if token.revoked_at is None else f"revoked {_minute(token.revoked_at)}",
                    )
                    for token in self.tokens
                ),
            ),
            _table(
                "revocations",
                ("KIND", "NAME", "SINCE"),
                (
                    (revocation.kind.value, revocation.name, _minute(revocation.revoked_at))
                    for revocation in self.revocations
                ),
            ),
        ]
        return "\n\n".join(parts)

    def _grid(self) -> str:
        running = self.running
        if running is None:
            return "grid: not running"
        return (
            f"grid: running since {_minute(running.started_at)} (process {running.pid}, version {running.version}), "
            f"{len(running.sessions)} sessions, {running.streams} streams"
        )

    def _cause(self, card: CardReport) -> str:
        if card.running is not None:
            return card.running.cause
        return "" if self.running is None else "the running grid does not know it: restart the grid"

    def _sessions(self, names: Mapping[str, str]) -> Iterator[str]:
        if self.running is not None:
            yield _table(
                "sessions",
                ("SESSION", "VM", "HYPERVISOR", "SEID", "OPERATIONS", "UNTIL"),
                (
                    (
                        session.name,
                        names.get(session.vmid, session.vmid),
                        names.get(session.hvid, session.hvid),
                        session.seid,
                        ",".join(session.operations),
                        _minute(session.expires_at),
                    )
                    for session in self.running.sessions
                ),
            )

    def _identities(self, title: str, short_form: str, identities: Iterable[Identity]) -> str:
        return _table(
            title,
            ("NAME", "STANDING", "UNTIL", "SEID", short_form),
            (
                (
                    identity.name,
                    self._standing(identity),
                    _day(identity.expires_at),
                    identity.seid or "-",
                    identity.thumbprint,
                )
                for identity in identities
            ),
        )

    def _standing(self, identity: Identity) -> str:
        if identity.revoked_at is not None:
            return f"revoked {_minute(identity.revoked_at)}"
        return "good" if identity.expires_at > self.now else "expired"


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
    return Overview(
        now=now,
        authority=authority,
        cards=tuple(report(element, state) for element, state in zip(settings.secure_elements, states, strict=True)),
        hypervisors=registry.identities(Role.HYPERVISOR),
        vms=registry.identities(Role.VM),
        servers=registry.identities(Role.SERVER),
        tokens=registry.tokens(unexpired_at=now),
        revocations=registry.revocations(),
        running=grid,
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


def _identity(identity: Identity) -> dict[str, Any]:
    return {
        "name": identity.name,
        "thumbprint": identity.thumbprint,
        "seid": identity.seid,
        "enrolled_at": math.floor(identity.recorded_at),
        "expires_at": math.floor(identity.expires_at),
        "revoked_at": _whole(identity.revoked_at),
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else math.floor(seconds)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _minute(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _table(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    body = list(rows)
    if not body:
        return f"{title}: none"
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *body)
    )
    return f"{title}:\n" + "\n".join(f"  {line}" for line in lines)
