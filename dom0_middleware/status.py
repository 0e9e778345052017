"""Would an operation work now? Each link from a VM's agent to its key, tried cheaply, for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

from cryptography import x509

from dom0_middleware.errors import MiddlewareError
from dom0_middleware.guest import GuestDomain
from dom0_middleware.identity import HypervisorIdentity
from dom0_middleware.policy import Policy
from dom0_middleware.sessions import Grid
from dom0_middleware.start_checks import Expiry
from dom0_middleware.state import StateStore
from dom0_middleware.tokens import ends_soon
from dom0_middleware.vms import Vms
from gose_client.trial import Link, LinkState
from secfunet.errors import SecFuNetError
from secfunet.identity import IdentityError, Role, load_certificate, verify_certificate
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.audit import AuditLog
from secfunet.vm_auth_token import TokenError, unverified_expiry

KEPT: Final = 1.0  # seconds for which an answer stands
STEP_TIMEOUT: Final = 3.0  # seconds for each step of the look at the grid
CERTIFICATE_NEAR_END: Final = 30 * 86400.0  # seconds

_STATES: Final = {
    LinkState.OK: pb.LINK_STATE_OK,
    LinkState.AWAY: pb.LINK_STATE_AWAY,
    LinkState.REFUSED: pb.LINK_STATE_REFUSED,
    LinkState.WRONG: pb.LINK_STATE_WRONG,
}
WORKING: Final = (pb.LINK_STATE_OK, pb.LINK_STATE_WARNING)


class StatusBoard:
    """``expiries``: of the certificates that this daemon was given or made."""

    def __init__(
        self,
        *,
        vms: Vms,
        grid: Grid,
        identity: HypervisorIdentity,
        authority: x509.Certificate,
        policy: Policy,
        audit: AuditLog,
        store: StateStore,
        expiries: Callable[[], Iterable[Expiry]],
        clock: Callable[[], float],
    ) -> None:
        self._vms = vms
        self._grid = grid
        self._identity = identity
        self._authority = authority
        self._policy = policy
        self._audit = audit
        self._store = store
        self._expiries = expiries
        self._clock = clock
        self._looking: asyncio.Task[list[pb.LinkStatus]] | None = None
        self._until = 0.0  # of the event loop's clock

    async def links(self) -> list[pb.LinkStatus]:
        """All of them; callers within a second share one look."""
        now = asyncio.get_running_loop().time()
        if self._looking is None or (self._looking.done() and now >= self._until):
            self._looking = asyncio.ensure_future(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> list[pb.LinkStatus]:
        try:
            found = [await self._libvirt(), *map(link_status, await self._grid.look(timeout=STEP_TIMEOUT))]
            if any(link.name == "card" and link.state == pb.LINK_STATE_OK for link in found):
                found.append(await self._hypervisor_certificate())
            found += [self._audited(), self._stored(), self._ruled()]
            found.append(certificates(self._expiries(), self._clock()))
            return found + [self._vm(guest) for guest in self._vms.guests()]
        finally:
            self._until = asyncio.get_running_loop().time() + KEPT

    async def _libvirt(self) -> pb.LinkStatus:
        try:
            async with asyncio.timeout(STEP_TIMEOUT):
                await self._vms.ask_hypervisor()
        except MiddlewareError as error:
            return status("libvirt", pb.LINK_STATE_AWAY, str(error))
        except TimeoutError:
            return status("libvirt", pb.LINK_STATE_AWAY, f"no answer within {STEP_TIMEOUT:g} s")
        return status("libvirt")

    async def _hypervisor_certificate(self) -> pb.LinkStatus:
        try:
            certificate = await self._identity.certificate(timeout=STEP_TIMEOUT)
        except (SecFuNetError, OSError) as error:
            return status("certificate", pb.LINK_STATE_AWAY, str(error))
        return hypervisor_certificate(certificate, self._authority, self._clock())

    def _audited(self) -> pb.LinkStatus:
        try:
            self._audit.flush()
        except (SecFuNetError, OSError) as error:
            return status("audit", pb.LINK_STATE_AWAY, str(error))
        return status("audit")

    def _stored(self) -> pb.LinkStatus:
        try:
            self._store.require_writable()
        except MiddlewareError as error:
            return status("state", pb.LINK_STATE_AWAY, str(error))
        return status("state")

    def _ruled(self) -> pb.LinkStatus:
        problems = "; ".join(self._policy.problems)
        return status("policy", pb.LINK_STATE_WRONG, problems) if problems else status("policy")

    def _vm(self, guest: GuestDomain) -> pb.LinkStatus:
        record, now = guest.record, self._clock()
        if record.revoked:
            return status("vm", pb.LINK_STATE_WARNING, "it was revoked here", vm=record.name)
        try:
            end = unverified_expiry(record.vm_auth_token) if record.vm_auth_token else 0
        except TokenError:
            end = 0
        if not end:
            return status("vm", pb.LINK_STATE_REFUSED, "it runs without a VM-Auth-Token", vm=record.name)
        if end <= now:
            return status("vm", pb.LINK_STATE_REFUSED, f"its VM-Auth-Token ended at {_time(end)}", vm=record.name)
        if ends_soon(record.vm_auth_token, now):
            return status("vm", pb.LINK_STATE_WARNING, f"its VM-Auth-Token ends at {_time(end)}", vm=record.name)
        if not guest.enrolled:
            return status("vm", pb.LINK_STATE_WARNING, "its agent has not enrolled", vm=record.name)
        return status("vm", vm=record.name)


def status(name: str, state: pb.LinkState = pb.LINK_STATE_OK, message: str = "", *, vm: str = "") -> pb.LinkStatus:
    return pb.LinkStatus(name=name, state=state, message=message[:500], vm=vm)


def link_status(link: Link) -> pb.LinkStatus:
    """As the client of the grid found it."""
    message = f"'{link.setting}': {link.message}" if link.setting else link.message
    return status(link.name, _STATES[link.state], message)


def hypervisor_certificate(certificate: bytes, authority: x509.Certificate, now: float) -> pb.LinkStatus:
    """Of the card's certificate (DER): is it one of this grid's hypervisors, and for how long?"""
    try:
        parsed = load_certificate(certificate)
        holder = verify_certificate(parsed, authority, role=Role.HYPERVISOR, now=now)
    except IdentityError as error:
        return status("certificate", pb.LINK_STATE_REFUSED, f"the card's certificate is no hypervisor's here: {error}")
    return certificates(
        [Expiry(f"hypervisor {holder.name}", parsed.not_valid_after_utc.timestamp())], now, "certificate"
    )


def certificates(expiries: Iterable[Expiry], now: float, name: str = "certificates") -> pb.LinkStatus:
    """One line for all of them."""
    near = sorted((each for each in expiries if each.at < now + CERTIFICATE_NEAR_END), key=lambda each: each.at)
    if not near:
        return status(name)
    message = ", ".join(f"{each.what}: {'ended' if each.at < now else 'ends'} at {_time(each.at)}" for each in near)
    return status(name, pb.LINK_STATE_WARNING, message)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
