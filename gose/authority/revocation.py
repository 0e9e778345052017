"""Revocation: rights are taken away, which goes on record and does not wait for that."""

from __future__ import annotations

from gose.authority.ledger import Action, AuthorityRecord, Ledger
from gose.registry import NotEnrolledError, Registry, Revocation
from secfunet.identity import Role


def revoke_token(registry: Registry, ledger: Ledger, jti: str) -> Revocation:
    """Revokes one VM-Auth-Token. Raises NotEnrolledError, NotOnRecordError (it is revoked then)."""
    token = registry.token(jti)
    if token is None:
        raise NotEnrolledError("token", jti)
    record = AuthorityRecord(
        Action.REVOKE_TOKEN, "permitted", jti=jti, thumbprint=token.vmid, until=int(token.expires_at)
    )
    with ledger.taking_away(record):
        return registry.revoke_token(jti)


def revoke_identity(registry: Registry, ledger: Ledger, role: Role, name: str) -> tuple[Revocation, ...]:
    """Revokes every certificate of that name. Raises NotEnrolledError, NotOnRecordError (it is revoked then)."""
    with ledger.taking_away(AuthorityRecord(Action.REVOKE, "permitted", role=role, name=name)):
        return registry.revoke_identity(role, name)
