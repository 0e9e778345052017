"""What a grid knows of those whom it serves: hypervisors, VMs with their secure elements, servers, tokens, and what was revoked.

One SQLite file (write-ahead log), shared by the commands of an administrator and a running grid. Nothing is cached here: each
question is read from the file, so a revocation that another process has committed is seen by the next question. A revocation is on
the disk before it is acknowledged.

An identity is a certificate under its thumbprint. It is *pending* from its issue until a card has shown that it holds it, then
*active*, and *replaced* when its name, or its secure element, went to another. Only active identities are found by their
thumbprint; all stay in the file.

``records`` are what it answers with, ``rows`` the tables, ``registry`` the questions.
"""

from gose.registry.records import (
    AlreadyEnrolledError,
    Identity,
    NotEnrolledError,
    RegistryError,
    Revocation,
    RevocationKind,
    State,
    Token,
)
from gose.registry.registry import TOKENS_KEPT, Registry, open_registry

__all__ = [
    "TOKENS_KEPT",
    "AlreadyEnrolledError",
    "Identity",
    "NotEnrolledError",
    "Registry",
    "RegistryError",
    "Revocation",
    "RevocationKind",
    "State",
    "Token",
    "open_registry",
]
