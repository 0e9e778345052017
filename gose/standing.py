"""Who is still in good standing: asked at every call, answered from the registry, and remembered only as long as that has not changed.

``check_right`` decides it; the guard of a running grid and ``gose status`` both ask it, so that what is shown is what is done.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from gose.errors import Reason, Refusal
from gose.registry import Identity, Registry, RevocationKind
from gose.slots.errors import CardNotAdmittedError
from gose.state import open_database
from secfunet.identity import Role, thumbprint

_MAX_REMEMBERED = 10_000

_REASONS = {
    RevocationKind.TOKEN: (Reason.TOKEN_REFUSED, "the VM-Auth-Token was revoked"),
    RevocationKind.VM: (Reason.VM_REFUSED, "the VM was revoked"),
    RevocationKind.HYPERVISOR: (Reason.HYPERVISOR_REFUSED, "the hypervisor was revoked"),
}


class RegistryStanding:
    """A revocation that another process (``gose revoke``) has committed is seen by the next call.

    SQLite's data_version changes whenever another connection has committed to the file, and costs a few microseconds to ask.
    """

    def __init__(self, registry: Registry, path: Path) -> None:
        self._registry = registry
        self._watch: sqlite3.Connection = open_database(path, "")
        self._version = -1
        self._good: set[tuple[str, str, str]] = set()
        self._good_cards: set[tuple[str, bytes]] = set()

    def close(self) -> None:
        """Closes its connection; the registry is the caller's."""
        self._watch.close()

    def check(self, *, vmid: str, hvid: str, token_id: str) -> None:
        """Raises Refusal if the VM, the hypervisor or the token was revoked, or is enrolled no longer."""
        self._look()
        key = (vmid, hvid, token_id)
        if key in self._good:
            return
        check_right(self._registry, vmid=vmid, hvid=hvid, token_id=token_id)
        self._good.add(key)

    def card(self, seid: str, certificate: bytes) -> None:
        """Raises CardNotAdmittedError unless the card in that secure element holds, under this certificate (DER), the key that the
        registry says, and it was not revoked. So a card that was put into another's place signs for nobody.
        """
        try:
            self._look()
            if (seid, certificate) in self._good_cards:
                return
            identity = self._registry.in_secure_element(seid)
            if self._registry.is_reserved(seid):
                raise CardNotAdmittedError(seid, "its administrator has it")
        except sqlite3.Error as error:
            raise CardNotAdmittedError(seid, f"the registry cannot be read: {error}") from error
        if identity is None:
            raise CardNotAdmittedError(seid, "it is not enrolled")
        if identity.thumbprint != thumbprint(certificate):
            raise CardNotAdmittedError(seid, f"it does not hold the key of the {identity.role} '{identity.name}'")
        if identity.is_revoked:
            raise CardNotAdmittedError(seid, f"the {identity.role} '{identity.name}' was revoked")
        self._good_cards.add((seid, certificate))

    def _look(self) -> None:
        """Forgets everything if the registry has changed."""
        (version,) = self._watch.execute("PRAGMA data_version").fetchone()
        if version != self._version or len(self._good) > _MAX_REMEMBERED:
            self._good.clear()
            self._good_cards.clear()
            self._version = version

    def hypervisor(self, hvid: str) -> Identity:
        """The enrolled hypervisor. Raises Refusal HYPERVISOR_REFUSED."""
        return _admitted(
            self._registry, Role.HYPERVISOR, hvid, Reason.HYPERVISOR_REFUSED, "this hypervisor is not admitted"
        )

    def vm(self, vmid: str) -> Identity:
        """The enrolled VM. Raises Refusal VM_REFUSED."""
        return _admitted(self._registry, Role.VM, vmid, Reason.VM_REFUSED, "this VM is not admitted")


def check_right(registry: Registry, *, vmid: str, hvid: str, token_id: str) -> None:
    """Raises Refusal if the VM, the hypervisor or the token was revoked, or is enrolled no longer."""
    revocation = registry.revocation_of(vmid=vmid, hvid=hvid, jti=token_id)
    if revocation is not None:
        reason, message = _REASONS[revocation.kind]
        raise Refusal(reason, message, detail=f"revoked at {revocation.revoked_at:.0f}: {revocation.value}")
    _admitted(registry, Role.HYPERVISOR, hvid, Reason.HYPERVISOR_REFUSED, "the hypervisor is not enrolled any more")
    _admitted(registry, Role.VM, vmid, Reason.VM_REFUSED, "the VM is not enrolled any more")


def _admitted(registry: Registry, role: Role, thumbprint: str, reason: Reason, message: str) -> Identity:
    identity = registry.find(role, thumbprint)
    if identity is None or identity.is_revoked:
        detail = "revoked" if identity is not None else "not enrolled"
        raise Refusal(reason, message, detail=f"{detail}: {thumbprint}")
    return identity
