"""Who may do what: the Users-Table and the APDU-Table of draft-urien-core-racs-15, 5.3, with default deny.

The rules, in their order:

1. TLS has checked that the certificate comes from the node's authority;
2. it is valid now;
3. a user with its thumbprint is who calls; else the user whose role and name it has, if it is a certificate of the authority for that role;
4. nobody else is a user;
5. a user has the cards of the grants, and no other exists for that user;
6. a command may be sent to a card if a rule of the grant's ``allow`` means it, and none of its ``deny`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509

from gose.errors import GoseError
from gose.racs.rules import ApduRule
from gose.racs.settings import NodeSettings, UserSettings
from secfunet.identity import (
    Holder,
    IdentityError,
    check_validity,
    der_of,
    load_certificate,
    role_of,
    thumbprint,
    verify_certificate,
)


class AccessDeniedError(GoseError):
    """The certificate is nobody's who may use this node."""


@dataclass(frozen=True)
class Grant:
    """What a user may do with one card."""

    allow: tuple[ApduRule, ...]
    deny: tuple[ApduRule, ...]
    may_name: bool

    def permits(self, apdu: bytes) -> bool:
        """Rule 6."""
        return any(rule.means(apdu) for rule in self.allow) and not any(rule.forbids(apdu) for rule in self.deny)


@dataclass(frozen=True)
class User:
    """Who calls. ``ends_at``: UTC seconds, when the certificate ends."""

    label: str
    grants: dict[str, Grant]
    ends_at: float


class Access:
    """The tables of a node."""

    def __init__(self, settings: NodeSettings, authority: x509.Certificate) -> None:
        self._authority = authority
        self._by_thumbprint = {user.thumbprint: user for user in settings.users if user.thumbprint is not None}
        self._by_holder = {
            Holder(user.holder_role, user.name): user for user in settings.users if user.name is not None
        }
        self._grants = {user.label: _grants(user) for user in settings.users}

    def user_of(self, untrusted_certificate: bytes, now: float) -> User:
        """Rules 2 to 5 for the certificate (DER) that TLS has accepted; ``now``: UTC seconds. Raises AccessDeniedError."""
        try:
            certificate = load_certificate(untrusted_certificate)
            check_validity(certificate, now)
            user = self._by_thumbprint.get(thumbprint(der_of(certificate)))
            if user is None:
                user = self._by_holder.get(role_of(certificate))
                if user is not None:
                    verify_certificate(certificate, self._authority, role=user.holder_role, now=now)
        except IdentityError as error:
            raise AccessDeniedError(str(error)) from None
        if user is None:
            raise AccessDeniedError("the certificate's holder is no user of this node")
        return User(user.label, self._grants[user.label], certificate.not_valid_after_utc.timestamp())


def _grants(user: UserSettings) -> dict[str, Grant]:
    return {
        seid: Grant(grant.allows(), grant.denies(), grant.may_name)
        for grant in user.grants
        for seid in grant.secure_elements
    }
