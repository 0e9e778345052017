"""Who may be let in: holders of the grid's certificates, of the roles that the settings name, in good standing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection

from cryptography import x509

from gose.errors import Refusal
from gose.radius.dialogue import NotAdmittedError
from gose.standing import RegistryStanding
from secfunet.identity import IdentityError, Role, load_certificate, role_of, thumbprint, verify_certificate


class Admission:
    """The rules, in their order: the certificate is the grid's, valid now, of an allowed role; enrolled; not revoked."""

    def __init__(
        self,
        roles: Collection[Role],
        authority: x509.Certificate,
        standing: RegistryStanding,
        clock: Callable[[], float],
    ) -> None:
        self._roles = frozenset(roles)
        self._authority = authority
        self._standing = standing
        self._clock = clock

    def __call__(self, certificate_der: bytes) -> str:
        """The holder's name. Raises NotAdmittedError."""
        try:
            certificate = load_certificate(certificate_der)
            holder = role_of(certificate)
            verify_certificate(certificate, self._authority, role=holder.role, now=self._clock())
            if holder.role not in self._roles:
                raise NotAdmittedError(f"a {holder.role} is not let in here")
            look = self._standing.hypervisor if holder.role is Role.HYPERVISOR else self._standing.vm
            look(thumbprint(certificate_der))
        except (IdentityError, Refusal) as error:
            detail = error.detail if isinstance(error, Refusal) else None
            raise NotAdmittedError(detail or str(error)) from None
        except sqlite3.Error as error:
            raise NotAdmittedError(f"the registry cannot be read: {error}") from None
        return holder.name
