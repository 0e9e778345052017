"""How anything reaches a grid: the hypervisor's login through OpenID, sessions for VMs, and operations.

``GoseClient`` is the client of one grid. A request walks down ``session`` (what heals within the caller's time), ``stream`` (batches
over one call), ``channel`` (gRPC over a private socket) and ``connectors`` (TLS-Tandem with the hypervisor's card). ``login`` makes a
session over ``http_connections`` and ``cookies``; ``content_keys`` has the card unwrap what containers are locked with.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import secfunet  # noqa: F401 - before gRPC: see there

if TYPE_CHECKING:
    from gose_client.client import GoseClient
    from gose_client.errors import (
        ContainerRefusedError,
        DeadlineError,
        GoseClientError,
        GridRefusedError,
        GridUnavailableError,
        GridUntrustedError,
        HypervisorCardError,
        ProtocolViolationError,
        RequestInvalidError,
        SessionClosedError,
    )
    from gose_client.session import BatchAnswer, VmSession
    from gose_client.settings import GoseClientSettings

__all__ = [
    "BatchAnswer",
    "ContainerRefusedError",
    "DeadlineError",
    "GoseClient",
    "GoseClientError",
    "GoseClientSettings",
    "GridRefusedError",
    "GridUnavailableError",
    "GridUntrustedError",
    "HypervisorCardError",
    "ProtocolViolationError",
    "RequestInvalidError",
    "SessionClosedError",
    "VmSession",
]

_ERRORS = "gose_client.errors"
_PLACES = {
    "BatchAnswer": "gose_client.session",
    "GoseClient": "gose_client.client",
    "GoseClientSettings": "gose_client.settings",
    "VmSession": "gose_client.session",
}


def __getattr__(name: str) -> object:
    """Imported when it is asked for: a command that only reads settings does without TLS-Tandem and OpenID (a third of its start)."""
    if name not in __all__:
        raise AttributeError(f"module 'gose_client' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES.get(name, _ERRORS)), name)
