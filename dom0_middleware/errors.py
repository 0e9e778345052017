"""Why the middleware refuses or fails: one error root. The reasons are in ``secfunet.rpc.reasons``."""

from __future__ import annotations

from secfunet.errors import SecFuNetError
from secfunet.rpc.facts import Facts
from secfunet.rpc.reasons import Reason

__all__ = ["GridFailed", "MiddlewareError", "Reason", "Refused", "Unavailable"]


class MiddlewareError(SecFuNetError):
    """Root of this room's errors. ``reason`` leaves the daemon, ``str(error)`` too: neither holds a secret.

    ``retry_after``: seconds after which it is worth to try again; None: waiting does not help. ``detail`` is for the audit log only.
    """

    def __init__(self, reason: Reason, message: str, *, retry_after: float | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
        self.detail = detail


class SettingUnusable(MiddlewareError):
    """What the setting ``key`` says cannot be used here; found when the daemon starts."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(Reason.INTERNAL, f"'{key}': {problem}")
        self.key = key


class Refused(MiddlewareError):
    """A caller's request is refused: by its form, by who it is, or by what it may do."""


class Unavailable(MiddlewareError):
    """Something that the middleware leans on does not answer now."""


class GridFailed(MiddlewareError):
    """The grid answered with a failure; code, reason and retry time are passed on as they are."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(Reason.GRID_UNAVAILABLE, facts.message, retry_after=facts.retry_after)
        self.facts = facts
