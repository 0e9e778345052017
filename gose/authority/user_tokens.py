"""The authority of users' tokens: packs a token into a container that one card takes, once.

Its key signs nothing else, so no container of another kind (results of operations, say) is ever taken for a token, or a token for one.
A running grid does not need it; a card is given its public key by the card's administrator.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from gose.authority.errors import TokenNotIssuedError
from gose.authority.ledger import Action, AuthorityRecord, OnRecord, unrecorded
from gose.registry import Registry
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.identity import IdentityError, der_of, role_of, rsa_key_of, thumbprint, verify_certificate
from secfunet.user_token import UserToken, UserTokenError, key_digest, public_key_der


class UserTokenAuthority:
    """The key that users' tokens are signed with, and the CA whose cards may have some."""

    def __init__(self, key: rsa.RSAPrivateKey, ca: x509.Certificate, *, record: OnRecord = unrecorded) -> None:
        self._key = key
        self._record = record
        self._ca = ca

    @property
    def public_key_der(self) -> bytes:
        """SubjectPublicKeyInfo, DER: what a card's administrator gives to the card."""
        return public_key_der(self._key.public_key())

    def issue(
        self,
        registry: Registry,
        *,
        certificate: x509.Certificate,
        name: str,
        value: bytes,
        profile: ContainerProfile,
        now: float,
    ) -> bytes:
        """A container with the token ``name`` for the card that holds ``certificate``. ``now``: UTC seconds.

        Its counter is recorded before it is handed out. Raises AuditError, and TokenNotIssuedError: the certificate is not the CA's, not
        valid now, was revoked, or its key is not RSA; the token's name or size is none.
        """
        try:
            holder = role_of(certificate)
            verify_certificate(certificate, self._ca, role=holder.role, now=now)
            key = rsa_key_of(certificate)
        except IdentityError as error:
            raise TokenNotIssuedError(f"no token for this certificate: {error}") from None
        der = der_of(certificate)
        if registry.is_identity_revoked(holder.role, thumbprint(der)):
            raise TokenNotIssuedError(f"the {holder.role} '{holder.name}' was revoked")
        recipient = key_digest(public_key_der(key))
        try:
            UserToken(1, recipient, name, value)
            self._record(
                AuthorityRecord(
                    Action.USER_TOKEN,
                    "permitted",
                    role=holder.role,
                    name=holder.name,
                    thumbprint=thumbprint(der),
                    detail=f"token {name}",
                )
            )
            counter = registry.record_user_token(recipient.hex(), name, now)
            token = UserToken(counter, recipient, name, value)
        except UserTokenError as error:
            raise TokenNotIssuedError(str(error)) from None
        # A content key of its own: nothing about one token follows from another.
        return ContainerSealer(key, self._key, profile, max_containers=1).seal(token.encode())
