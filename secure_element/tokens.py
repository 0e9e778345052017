"""The tokens of a card's user: taken out of containers that a trusted authority made for this card, and kept.

The rules for a container, in their order. One status word (6A80) for whatever is wrong with it, so that the card tells nobody what:

1. it is no longer than a token's container can be;
2. its trailer is the signature of one of the authorities that the administrator named; nothing is decrypted before that;
3. the identity's private key opens the header, and the content key the body;
4. what comes out is a token, made for this very key;
5. its counter is above the last one that the card has taken from that authority.

Then there must be room (6A84). Token and counter are written in one step, and are durable before the card answers: whenever its power is
cut, either both are there, or neither is and the same container can be loaded again. An authority's counter outlives the token, and even
the authority: one that is trusted again goes on where it was.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from secfunet.card.tlv import encode_tlv
from secfunet.container import ContainerError, ContainerProfile, VerifiedContainer, verify_container
from secfunet.user_token import MAX_CONTAINER, UserToken, UserTokenError, key_digest, load_authority_key
from secure_element.errors import CommandRefusedError, Sw
from secure_element.identities import Identities
from secure_element.keys import KeyPair
from secure_element.store import CardStore, IdentityRecord, TokenAuthorityRecord, TokenRecord

log = logging.getLogger(__name__)

MAX_TOKENS: Final = 64
"""Tokens of a card, over all its identities."""
MAX_TOKEN_AUTHORITIES: Final = 16
"""Authorities that a card remembers: those that it trusts, and those whose counters it must not forget."""

_ENTRY: Final = 1


class UserTokens:
    """Tokens and their authorities over one open store."""

    def __init__(self, store: CardStore, identities: Identities) -> None:
        self._store = store
        self._identities = identities

    # Authorities: the administrator's commands

    def trust(self, untrusted: bytes) -> None:
        """Takes an authority's public key (SubjectPublicKeyInfo, DER). Raises CommandRefusedError: 6A80, 6A84."""
        try:
            load_authority_key(untrusted)
        except UserTokenError:
            raise CommandRefusedError(Sw.WRONG_DATA) from None
        known = self._store.contents.token_authorities
        found = next((one for one in known if one.public_key == untrusted), None)
        if found is None and len(known) >= MAX_TOKEN_AUTHORITIES:
            raise CommandRefusedError(Sw.FULL)
        trusted = TokenAuthorityRecord(untrusted, 0 if found is None else found.counter, is_trusted=True)
        self._write_authorities((*(one for one in known if one is not found), trusted))

    def distrust(self, untrusted_digest: bytes) -> None:
        """Believes the authority of that key digest no longer; its tokens stay. Raises CommandRefusedError: 6A88."""
        found = next((one for one in self._trusted() if key_digest(one.public_key) == untrusted_digest), None)
        if found is None:
            raise CommandRefusedError(Sw.NOT_FOUND)
        known = self._store.contents.token_authorities
        self._write_authorities(tuple(replace(one, is_trusted=False) if one is found else one for one in known))

    def authorities(self) -> bytes:
        """Items 01, one a trusted authority: digest of its key (32) ‖ the last counter taken from it (8)."""
        return encode_tlv((_ENTRY, key_digest(one.public_key) + one.counter.to_bytes(8)) for one in self._trusted())

    # Tokens: the user's commands, for the current identity

    def load(self, record: IdentityRecord, untrusted_profile: int, untrusted: bytes) -> None:
        """Takes a container. Raises CommandRefusedError: 6A80 whatever is wrong with it, 6A84; 6B00 (profile), 6A81 (a key that is not
        RSA), 6985 (a bound identity).
        """
        try:
            profile = ContainerProfile(untrusted_profile)
        except ValueError:
            raise CommandRefusedError(Sw.WRONG_P1_P2) from None
        if record.recipient:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)  # its key works for one hypervisor only
        if not record.algorithm.is_rsa:
            raise CommandRefusedError(Sw.NOT_SUPPORTED)
        authority, token = self._open(self._identities.key_of(record), profile, untrusted)
        others = tuple(one for one in record.tokens if one.name != token.name)
        elsewhere = sum(len(one.tokens) for one in self._identities.records if one is not record)
        if elsewhere + len(others) >= MAX_TOKENS:
            raise CommandRefusedError(Sw.FULL)
        contents = self._store.contents
        kept = replace(record, tokens=(*others, TokenRecord(token.name, token.counter, token.value)))
        counted = replace(authority, counter=token.counter)
        self._store.replace(
            replace(
                contents,
                identities=tuple(kept if one is record else one for one in contents.identities),
                token_authorities=tuple(counted if one is authority else one for one in contents.token_authorities),
            )
        )

    @staticmethod
    def listing(record: IdentityRecord) -> bytes:
        """Items 01, one a token, oldest first: counter (8) ‖ size of its value (2) ‖ name."""
        return encode_tlv(
            (_ENTRY, one.counter.to_bytes(8) + len(one.value).to_bytes(2) + one.name.encode()) for one in record.tokens
        )

    @staticmethod
    def value(record: IdentityRecord, untrusted_name: bytes) -> bytes:
        """The token of that name. Raises CommandRefusedError: 6A88."""
        return _named(record, untrusted_name).value

    def delete(self, record: IdentityRecord, untrusted_name: bytes) -> None:
        """Forgets the token of that name; its counter stays. Raises CommandRefusedError: 6A88."""
        token = _named(record, untrusted_name)
        kept = tuple(one for one in record.tokens if one is not token)
        self._identities.replace(record, replace(record, tokens=kept))

    # Containers

    def _open(
        self, key: KeyPair, profile: ContainerProfile, untrusted: bytes
    ) -> tuple[TokenAuthorityRecord, UserToken]:
        """Rules 1 to 5."""
        try:
            if len(untrusted) > MAX_CONTAINER:
                raise ContainerError
            authority, verified = self._verify(key.size, profile, untrusted)
            token = UserToken.decode(verified.open(key.unwrap(profile, verified.header)))
            if token.recipient != key_digest(key.public_key_der) or token.counter <= authority.counter:
                raise ContainerError
        except (ContainerError, UserTokenError):
            log.warning("a token's container is refused")
            raise CommandRefusedError(Sw.WRONG_DATA) from None
        return authority, token

    def _verify(
        self, header_size: int, profile: ContainerProfile, untrusted: bytes
    ) -> tuple[TokenAuthorityRecord, VerifiedContainer]:
        """Rule 2: a container does not say whose it is, so each authority's key is tried."""
        for authority in self._trusted():
            try:
                public_key = load_authority_key(authority.public_key)
                return authority, verify_container(untrusted, public_key, header_size, profile)
            except ContainerError:
                continue
        raise ContainerError

    def _trusted(self) -> tuple[TokenAuthorityRecord, ...]:
        return tuple(one for one in self._store.contents.token_authorities if one.is_trusted)

    def _write_authorities(self, authorities: tuple[TokenAuthorityRecord, ...]) -> None:
        self._store.replace(replace(self._store.contents, token_authorities=authorities))


def _named(record: IdentityRecord, untrusted_name: bytes) -> TokenRecord:
    found = next((one for one in record.tokens if one.name.encode() == untrusted_name), None)
    if found is None:
        raise CommandRefusedError(Sw.NOT_FOUND)
    return found
