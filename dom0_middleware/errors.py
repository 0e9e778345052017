"""Why the middleware refuses or fails: one error root, and every reason by name."""

from __future__ import annotations

from enum import StrEnum

from secfunet.errors import SecFuNetError


class Reason(StrEnum):
    """The reasons that leave this daemon, as ``google.rpc.ErrorInfo.reason``; ``api/errors.py`` gives each its gRPC code."""

    # The request itself.
    DEADLINE_REQUIRED = "DEADLINE_REQUIRED"
    REQUEST_INVALID = "REQUEST_INVALID"
    OPERATION_INVALID = "OPERATION_INVALID"
    CSR_INVALID = "CSR_INVALID"
    VM_CERTIFICATE_INVALID = "VM_CERTIFICATE_INVALID"
    TOKEN_INVALID = "TOKEN_INVALID"  # noqa: S105 - the name of a reason
    # Who calls.
    CERTIFICATE_MISSING = "CERTIFICATE_MISSING"
    CERTIFICATE_FOREIGN = "CERTIFICATE_FOREIGN"
    CERTIFICATE_NOT_CURRENT = "CERTIFICATE_NOT_CURRENT"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    JOIN_SECRET_REFUSED = "JOIN_SECRET_REFUSED"  # noqa: S105 - the name of a reason
    CHANNEL_FOREIGN = "CHANNEL_FOREIGN"
    CHANNEL_FLOODED = "CHANNEL_FLOODED"
    ORCHESTRATOR_NOT_ALLOWED = "ORCHESTRATOR_NOT_ALLOWED"
    DESTINATION_NOT_ALLOWED = "DESTINATION_NOT_ALLOWED"
    # What it may do.
    POLICY_INVALID = "POLICY_INVALID"
    POLICY_DENIED = "POLICY_DENIED"
    RATE_LIMITED = "RATE_LIMITED"
    TOO_MANY_OPERATIONS = "TOO_MANY_OPERATIONS"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    TOKEN_MISSING = "TOKEN_MISSING"  # noqa: S105 - the name of a reason
    TOKEN_EXPIRED = "TOKEN_EXPIRED"  # noqa: S105 - the name of a reason
    OPERATION_NOT_AUTHORISED = "OPERATION_NOT_AUTHORISED"
    VM_REVOKED = "VM_REVOKED"
    # The state of things.
    DOMAIN_NOT_RUNNING = "DOMAIN_NOT_RUNNING"
    SESSION_ENDED = "SESSION_ENDED"
    VM_UNKNOWN = "VM_UNKNOWN"
    VM_EXISTS = "VM_EXISTS"
    VM_STATE_WRONG = "VM_STATE_WRONG"
    BINDING_MISMATCH = "BINDING_MISMATCH"
    # What we lean on.
    HYPERVISOR_UNAVAILABLE = "HYPERVISOR_UNAVAILABLE"
    HYPERVISOR_REFUSED = "HYPERVISOR_REFUSED"
    AUDIT_UNAVAILABLE = "AUDIT_UNAVAILABLE"
    STATE_UNAVAILABLE = "STATE_UNAVAILABLE"
    GRID_UNAVAILABLE = "GRID_UNAVAILABLE"
    CARD_UNAVAILABLE = "CARD_UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    WATCHER_TOO_SLOW = "WATCHER_TOO_SLOW"
    INTERNAL = "INTERNAL"


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
    """The grid answered with a failure; its code (a google.rpc.Code), reason and text are passed on as they are."""

    def __init__(self, code: int, grid_reason: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(Reason.GRID_UNAVAILABLE, message, retry_after=retry_after)
        self.code = code
        self.grid_reason = grid_reason
