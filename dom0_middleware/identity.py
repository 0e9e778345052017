"""Who a VM is, as it may use its key now: the answer of GetIdentity and WatchIdentity."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from dom0_middleware.guest import GuestDomain
from dom0_middleware.policy import Policy
from dom0_middleware.sessions import GridSession, VmSessions
from secfunet.card.pool import CardPool
from secfunet.middleware.v1 import agent_pb2
from secfunet.vm_auth_token import unverified_expiry

log = logging.getLogger(__name__)


class HypervisorIdentity(Protocol):
    async def certificate(self, *, timeout: float) -> bytes:
        """The HVID, X.509, DER."""
        ...

    @property
    def known(self) -> bytes:
        """The same if it was asked for before, else empty."""
        ...


class CardHypervisorIdentity:
    """The HVID out of the hypervisor's card, asked once."""

    def __init__(self, cards: CardPool) -> None:
        self._cards = cards
        self._certificate: bytes | None = None
        self._lock = asyncio.Lock()

    @property
    def known(self) -> bytes:
        return self._certificate or b""

    async def certificate(self, *, timeout: float) -> bytes:
        """Raises what the card raises (CardError)."""
        if self._certificate is None:
            async with self._lock:
                if self._certificate is None:
                    async with self._cards.lease(timeout=timeout) as card:
                        self._certificate = await card.certificate()
        return self._certificate


class Identities:
    def __init__(self, *, policy: Policy, sessions: VmSessions, hypervisor: HypervisorIdentity) -> None:
        self._policy = policy
        self._sessions = sessions
        self._hypervisor = hypervisor
        self._obstacles: dict[str, str] = {}

    def note(self, guest: GuestDomain, obstacle: str) -> None:
        """Logs what keeps a VM from its key ("": nothing), once for as long as it stays the same: this is asked every few seconds."""
        if self._obstacles.get(guest.uuid, "") == obstacle:
            return
        facts = {"vm": guest.uuid, "name_of_vm": guest.record.name}
        if obstacle:
            self._obstacles[guest.uuid] = obstacle
            log.warning("the VM cannot use its key: %s", obstacle, extra=facts)
        else:
            del self._obstacles[guest.uuid]
            log.info("the VM can use its key", extra=facts)

    async def identity(self, guest: GuestDomain, *, timeout: float, correlation: str = "") -> agent_pb2.Identity:
        """With the grid's word: opens the VM's session if need be. Raises what that raises, Refused (VM_REVOKED, TOKEN_MISSING)."""
        guest.require_not_ended()
        guest.require_authorised()
        session = await self._sessions.session(guest.record, timeout=timeout, correlation=correlation)
        certificate = await self._hypervisor.certificate(timeout=timeout)
        # Again: the run may have ended, or the right, while grid and card were asked.
        guest.require_not_ended()
        guest.require_authorised()
        return self._of(guest, session, certificate)

    async def probe(self, guest: GuestDomain, *, timeout: float, correlation: str = "") -> int:
        """Would an operation of this VM reach its card now? The grid's clock, UTC seconds. Raises what an operation would."""
        return await self._sessions.probe(guest.record, timeout=timeout, correlation=correlation)

    def known(self, guest: GuestDomain) -> agent_pb2.Identity:
        """What is known without asking anybody: what only the grid can fill may be empty, a revoked VM has no operations."""
        session = None if guest.record.revoked else self._sessions.current(guest.uuid)
        return self._of(guest, session, self._hypervisor.known)

    def _of(self, guest: GuestDomain, session: GridSession | None, certificate: bytes) -> agent_pb2.Identity:
        identity = agent_pb2.Identity(vm_certificate=guest.record.vm_certificate, hypervisor_certificate=certificate)
        if session is not None:
            identity.container_authority = session.container_authority
            identity.authorised_until = unverified_expiry(guest.record.vm_auth_token)
            allowed = self._policy.operations(guest.subject) & frozenset(session.operations)
            identity.operations.extend(sorted(allowed))
        return identity
