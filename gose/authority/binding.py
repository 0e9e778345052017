"""Binding: the card of a VM gives its results to one hypervisor only, in containers that it signs itself.

A running grid lets go of the card while that is changed, and sees the new binding when it connects again. Rules, in their order: VM and
hypervisor are enrolled and in good standing; the card holds the VM's certificate; the act is on record; only then it is bound, and the
registry has it, so that tokens say whose signature its results have. If this dies in between, the agent believes nobody: run it again.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Final

from gose.authority.enrolment import CardAccess, administered
from gose.authority.errors import EnrolmentError
from gose.authority.ledger import Action, AuthorityRecord, OnRecord
from gose.registry import Identity, Registry
from secfunet.apdu import StatusError
from secfunet.container import ContainerProfile
from secfunet.identity import Role

TIMEOUT: Final = 30.0
"""Seconds in all, most of them until a running grid has let go of the card."""

_SW_NOT_SUPPORTED: Final = 0x6A81


async def bind(
    vm: Identity,
    hypervisor: Identity | None,
    label: str,
    card: CardAccess,
    registry: Registry,
    *,
    profile: ContainerProfile,
    now: float,
    record: OnRecord,
) -> None:
    """Binds the card of ``vm`` (its TLS-Id ``label``) to ``hypervisor``; None: to nobody any more.

    Raises EnrolmentError, AuditError, and what a card raises (CardError, ApduError).
    """
    for identity in (vm, hypervisor):
        if identity is not None and (identity.is_revoked or identity.expires_at <= now):
            raise EnrolmentError(f"the {identity.role} '{identity.name}' was revoked or has expired")
    if vm.seid is None:
        raise EnrolmentError(f"the key of '{vm.name}' is in no secure element of this grid")
    try:
        with registry.reserved(vm.seid, seconds=TIMEOUT):
            async with asyncio.timeout(TIMEOUT), administered(card) as client:
                if not hmac.compare_digest(await client.certificate(label), vm.certificate):
                    raise EnrolmentError(f"{card.where} does not hold the key of the {Role.VM} '{vm.name}'")
                record(
                    AuthorityRecord(
                        Action.UNBIND if hypervisor is None else Action.BIND,
                        "permitted",
                        role=Role.VM,
                        name=vm.name,
                        seid=vm.seid,
                        thumbprint=vm.thumbprint,
                        hypervisor="" if hypervisor is None else hypervisor.name,
                    )
                )
                await client.bind_identity(label, profile, b"" if hypervisor is None else hypervisor.certificate)
    except TimeoutError:
        raise EnrolmentError(f"{card.where} was not free within {TIMEOUT:g} s: run this again") from None
    except StatusError as error:
        if error.sw != _SW_NOT_SUPPORTED:
            raise
        raise EnrolmentError(
            f"only a VM with an RSA key can be bound: it signs containers; '{vm.name}' has another"
        ) from None
    registry.record_binding(vm.thumbprint, None if hypervisor is None else hypervisor.thumbprint)
