"""What the grid would do with a right now: its own questions are asked, so that nothing is shown as good that is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gose.errors import Refusal
from gose.places import Claim, Places
from gose.registry import Identity, Registry, Token
from gose.running import RunningSession
from gose.standing import check_right
from gose.state import open_database
from secfunet.service.tables import moment


@dataclass(frozen=True)
class Standing:
    """``refusal`` None: it is good; else why it is refused."""

    refusal: str | None = None

    def __str__(self) -> str:
        return "good" if self.refusal is None else self.refusal


@contextlib.contextmanager
def open_places(state: Path) -> Iterator[Places | None]:
    """Where VMs are, as the grid of this state folder knows it; None: no grid ever ran there."""
    path = state / "service.sqlite"
    if not path.exists():
        yield None
        return
    with contextlib.closing(open_database(path, "")) as database:
        yield Places(database)


def standing_of_token(registry: Registry, places: Places | None, token: Token, now: float) -> Standing:
    """Rules, in their order: those of every call; the card's binding; where the VM is."""
    if token.revoked_at is not None:
        return Standing(f"revoked {moment(token.revoked_at)}")
    try:
        check_right(registry, vmid=token.vmid, hvid=token.hvid, token_id=token.jti)
        if places is not None:
            places.check(Claim(token.vmid, token.hvid, token.issued_at))
    except Refusal as refusal:
        return Standing(f"refused: {refusal.message}")
    if registry.binding(token.vmid) not in (None, token.hvid):
        return Standing("refused: the VM's card is bound to another hypervisor")
    return Standing("expired") if token.expires_at <= now else Standing()


def standing_of_session(registry: Registry, session: RunningSession, now: float) -> Standing:
    """As the guard sees it with the session's next call."""
    try:
        check_right(registry, vmid=session.vmid, hvid=session.hvid, token_id=session.token_id)
    except Refusal as refusal:
        return Standing(f"refused: {refusal.message}")
    return Standing("expired") if session.expires_at <= now else Standing()


def standing_of_identity(identity: Identity, now: float) -> Standing:
    """Of a certificate."""
    if identity.revoked_at is not None:
        return Standing(f"revoked {moment(identity.revoked_at)}")
    return Standing("expired") if identity.expires_at <= now else Standing()
