"""Associations: the secret that a provider and a relying party share, and the signatures made with it (§6, §8)."""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from secfunet.openid.errors import OpenIdFormatError
from secfunet.openid.form import encode_key_values

MAX_HANDLE = 255
_HANDLE = re.compile(r"[\x21-\x7e]{1,255}")


class AssociationType(Enum):
    """How messages are signed (§8.3)."""

    HMAC_SHA1 = "HMAC-SHA1"
    HMAC_SHA256 = "HMAC-SHA256"

    @property
    def hash_name(self) -> str:
        return "sha1" if self is AssociationType.HMAC_SHA1 else "sha256"

    @property
    def key_size(self) -> int:
        """Bytes of the MAC key."""
        return 20 if self is AssociationType.HMAC_SHA1 else 32


class SessionType(Enum):
    """How the MAC key travels (§8.4)."""

    NO_ENCRYPTION = "no-encryption"
    DH_SHA1 = "DH-SHA1"
    DH_SHA256 = "DH-SHA256"

    @property
    def hash_name(self) -> str:
        """The hash that hides the MAC key; "" if nothing hides it."""
        return {"no-encryption": "", "DH-SHA1": "sha1", "DH-SHA256": "sha256"}[self.value]

    def fits(self, association_type: AssociationType) -> bool:
        """Whether a MAC key of that type is as long as the hash."""
        return self.hash_name in ("", association_type.hash_name)


class AssociationKind(Enum):
    """Who holds an association, and for what. The kinds share a store and never each other's handles."""

    SHARED = "shared"  # the provider's half of one made by an associate request
    PRIVATE = "private"  # the provider's own, for one assertion that it will be asked about (§11.4.2)
    RELYING = "relying"  # the relying party's half


@dataclass(frozen=True)
class Association:
    """A MAC key with its name and its end; ``expires_at`` in UTC seconds."""

    kind: AssociationKind
    endpoint: str
    handle: str
    type: AssociationType
    secret: bytes = field(repr=False)
    expires_at: float

    def __post_init__(self) -> None:
        check_handle(self.handle)
        if len(self.secret) != self.type.key_size:
            raise OpenIdFormatError("a MAC key has the wrong size")

    def sign(self, message: Mapping[str, str], signed: str) -> str:
        """Base64 MAC over the fields that ``signed`` lists, in its order (§6.1).

        Raises OpenIdFormatError if the list is empty, repeats a field or names one that the message lacks.
        """
        names = signed.split(",")
        if len(set(names)) != len(names):
            raise OpenIdFormatError("the list of signed fields repeats one")
        try:
            covered = encode_key_values((name, message[name]) for name in names)
        except KeyError:
            raise OpenIdFormatError("the list of signed fields names one that is not there") from None
        return base64.b64encode(hmac.digest(self.secret, covered, self.type.hash_name)).decode("ascii")

    def verify(self, message: Mapping[str, str]) -> None:
        """Raises OpenIdFormatError unless ``sig`` is right for the fields that ``signed`` lists."""
        expected = self.sign(message, message.get("signed", ""))
        if not hmac.compare_digest(expected.encode(), message.get("sig", "").encode("utf-8", "surrogatepass")):
            raise OpenIdFormatError("the signature is wrong")


def check_handle(untrusted: str) -> str:
    """Raises OpenIdFormatError unless this can be an association's handle: 1 to 255 printable ASCII characters (§8.2.1)."""
    if not _HANDLE.fullmatch(untrusted):
        raise OpenIdFormatError("this is no association handle")
    return untrusted
