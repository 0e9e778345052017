"""What is on record, and how a question about it fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from gose.errors import GoseError
from secfunet.identity import Role


class RegistryError(GoseError):
    """Root of the registry's refusals."""


class NotEnrolledError(RegistryError):
    """Nothing of that name (or thumbprint, or jti) is in the registry."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} '{name}' is in the registry")
        self.kind = kind
        self.name = name


class AlreadyEnrolledError(RegistryError):
    """The name, or the secure element, is in use; ``by`` names the holder."""

    def __init__(self, message: str, by: str) -> None:
        super().__init__(message)
        self.by = by


class State(StrEnum):
    """Where an identity stands."""

    PENDING = "pending"
    ACTIVE = "active"
    REPLACED = "replaced"


class RevocationKind(StrEnum):
    """What was revoked: a token (by jti), or an identity (by thumbprint)."""

    TOKEN = "token"  # noqa: S105 - a word, no password
    VM = "vm"
    HYPERVISOR = "hypervisor"
    SERVER = "server"


@dataclass(frozen=True)
class Identity:
    """A certificate that the CA issued. Times are UTC seconds; ``revoked_at`` None: not revoked."""

    role: Role
    name: str
    thumbprint: str
    certificate: bytes = field(repr=False)  # DER
    seid: str | None  # the secure element of the grid that holds its key; None: a card elsewhere
    state: State
    recorded_at: float
    expires_at: float
    revoked_at: float | None

    @property
    def is_revoked(self) -> bool:
        """Whether it must be refused."""
        return self.revoked_at is not None


@dataclass(frozen=True)
class Token:
    """What is kept of a VM-Auth-Token that was issued (never the token itself). Times are UTC seconds."""

    jti: str
    vmid: str
    hvid: str
    operations: frozenset[str]
    issued_at: float
    expires_at: float
    revoked_at: float | None


@dataclass(frozen=True)
class Revocation:
    """One revocation; ``value`` is a jti or a thumbprint, ``name`` what a person calls it. ``sequence`` only grows."""

    sequence: int
    kind: RevocationKind
    value: str
    name: str
    revoked_at: float
