"""The token authority of a grid: states that a VM may use its key from one hypervisor."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Final

from gose.authority.errors import TokenNotIssuedError
from gose.authority.ledger import Action, AuthorityRecord, OnRecord, unrecorded
from gose.registry import Identity, Registry
from secfunet.identity import Role
from secfunet.operation import OPERATIONS
from secfunet.vm_auth_token import TokenPrivateKey, TokenPublicKey, issue_token, key_id

MIN_VALIDITY: Final = 1.0
MAX_VALIDITY: Final = 366 * 86400.0


class TokenAuthority:
    """The key that tokens are signed with, and the name under which they are issued."""

    def __init__(self, key: TokenPrivateKey, *, issuer: str, record: OnRecord = unrecorded) -> None:
        self._key = key
        self._record = record
        self.issuer = issuer
        self.public_keys: Mapping[str, TokenPublicKey] = {key_id(key.public_key()): key.public_key()}

    def issue(
        self,
        registry: Registry,
        *,
        vm: str,
        hypervisor: str,
        audience: str,
        operations: Iterable[str] = OPERATIONS,
        now: float,
        valid: float,
    ) -> str:
        """A token for the VM and the hypervisor of these names, ``valid`` seconds from ``now`` (UTC seconds), recorded before
        it is handed out.

        It never outlives the certificates that it names. Raises NotEnrolledError, AuditError, and TokenNotIssuedError if one of the two
        was revoked or has expired, or for an operation that does not exist.
        """
        allowed = frozenset(operations)
        if not allowed or not allowed <= set(OPERATIONS):
            raise TokenNotIssuedError(f"operations are one or several of {', '.join(OPERATIONS)}")
        if not MIN_VALIDITY <= valid <= MAX_VALIDITY:
            raise TokenNotIssuedError("a token is valid for at least a second and at most a year")
        the_vm = _in_good_standing(registry.named(Role.VM, vm), now)
        the_hypervisor = _in_good_standing(registry.named(Role.HYPERVISOR, hypervisor), now)
        bound_to = registry.binding(the_vm.thumbprint)
        if bound_to not in (None, the_hypervisor.thumbprint):
            raise TokenNotIssuedError(
                f"the card of '{vm}' is bound to another hypervisor: 'gose bind-vm {vm} --hypervisor {hypervisor}' first"
            )
        begin = int(now)
        end = int(min(now + valid, the_vm.expires_at, the_hypervisor.expires_at))
        if end <= begin:
            raise TokenNotIssuedError("the certificates end before a token could begin")
        jti = secrets.token_hex(16)  # never begins with a hyphen: it is typed behind commands
        token = issue_token(
            self._key,
            issuer=self.issuer,
            audience=audience,
            vmid=the_vm.thumbprint,
            hvid=the_hypervisor.thumbprint,
            operations=allowed,
            issued_at=begin,
            expires_at=end,
            jti=jti,
            from_card=bound_to is not None,
        )
        self._record(
            AuthorityRecord(
                Action.TOKEN,
                "permitted",
                role=Role.VM,
                name=vm,
                thumbprint=the_vm.thumbprint,
                hypervisor=hypervisor,
                jti=jti,
                operations=",".join(sorted(allowed)),
                until=end,
            )
        )
        registry.record_token(jti, the_vm.thumbprint, the_hypervisor.thumbprint, allowed, now, end)
        return token


def _in_good_standing(identity: Identity, now: float) -> Identity:
    if identity.is_revoked:
        raise TokenNotIssuedError(
            f"the {identity.role} '{identity.name}' was revoked: enrol it again (--replace) first"
        )
    if identity.expires_at <= now:
        raise TokenNotIssuedError(
            f"the certificate of the {identity.role} '{identity.name}' has expired: enrol it again first"
        )
    return identity
