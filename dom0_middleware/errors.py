"""Why the middleware refuses or fails: one error root. The reasons are in ``secfunet.rpc.reasons``."""

from __future__ import annotations

from secfunet.errors import SecFuNetError
from secfunet.rpc.facts import Facts
from secfunet.rpc.reasons import Reason

__all__ = ["GridFailed", "MiddlewareError", "Reason", "Refused", "Unavailable", "cause_of"]


class MiddlewareError(SecFuNetError):
    """Root of this room's errors. ``reason`` leaves the daemon; ``str(error)`` is for orchestrators and logs, and holds no secret.

    ``retry_after``: seconds after which it is worth to try again; None: waiting does not help. ``detail`` is for the audit log only.
    ``told``: what a guest is told in place of the reason's own sentence, and only what follows from its own request.
    """

    def __init__(
        self, reason: Reason, message: str, *, retry_after: float | None = None, detail: str = "", told: str = ""
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
        self.detail = detail
        self.told = told


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


def cause_of(error: Exception) -> str:
    """What dom0's own records say of it, beyond the reason."""
    detail = error.detail if isinstance(error, MiddlewareError) else ""
    return detail or str(error) or type(error).__name__
