"""What the grid refuses because there is too much to do."""

from __future__ import annotations

from grpc import StatusCode

from gose.errors import Refusal


def is_overload(refusal: Refusal) -> bool:
    """Whether nothing was done because there is too much to do."""
    return refusal.code is StatusCode.RESOURCE_EXHAUSTED
