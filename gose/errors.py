"""The grid's errors, and the one table that says what a refusal looks like outside: reason, gRPC code, HTTP status.

A reason is for programs (google.rpc.ErrorInfo, domain ``gose.secfunet``; ``reason`` in the JSON of the HTTPS door). Where the true
reason would help an attacker more than a caller it stays in the log: a refused VM-Auth-Token is ``TOKEN_REFUSED`` outside, whatever
was wrong with it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from grpc import StatusCode

from secfunet.errors import SecFuNetError

ERROR_DOMAIN: Final = "gose.secfunet"


class GoseError(SecFuNetError):
    """Root of what the grid raises."""


class Reason(StrEnum):
    """Every reason that a caller of the grid may meet."""

    # who is asking
    CERTIFICATE_REQUIRED = "CERTIFICATE_REQUIRED"
    SESSION_REQUIRED = "SESSION_REQUIRED"
    SESSION_UNKNOWN = "SESSION_UNKNOWN"
    SESSION_EXPIRED = "SESSION_EXPIRED"
    HYPERVISOR_MISMATCH = "HYPERVISOR_MISMATCH"
    HYPERVISOR_REFUSED = "HYPERVISOR_REFUSED"
    VM_REFUSED = "VM_REFUSED"
    TOKEN_REFUSED = "TOKEN_REFUSED"  # noqa: S105 - a reason, no secret
    VM_ELSEWHERE = "VM_ELSEWHERE"
    # logging in
    REQUEST_INVALID = "REQUEST_INVALID"
    LOGIN_UNKNOWN = "LOGIN_UNKNOWN"
    LOGIN_REFUSED = "LOGIN_REFUSED"
    TOO_MANY_LOGINS = "TOO_MANY_LOGINS"
    TOO_MANY_SESSIONS = "TOO_MANY_SESSIONS"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    OPENID_PROVIDER_UNAVAILABLE = "OPENID_PROVIDER_UNAVAILABLE"
    # operations
    DEADLINE_REQUIRED = "DEADLINE_REQUIRED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    OPERATION_INVALID = "OPERATION_INVALID"
    OPERATION_NOT_ALLOWED = "OPERATION_NOT_ALLOWED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    SLOT_BUSY = "SLOT_BUSY"
    CARD_UNAVAILABLE = "CARD_UNAVAILABLE"
    CARD_REFUSED = "CARD_REFUSED"
    CARD_NOT_IN_GRID = "CARD_NOT_IN_GRID"
    # the grid itself
    NOT_FOUND = "NOT_FOUND"
    STATE_UNAVAILABLE = "STATE_UNAVAILABLE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"


CODES: Final[dict[Reason, StatusCode]] = {
    Reason.CERTIFICATE_REQUIRED: StatusCode.UNAUTHENTICATED,
    Reason.SESSION_REQUIRED: StatusCode.UNAUTHENTICATED,
    Reason.SESSION_UNKNOWN: StatusCode.UNAUTHENTICATED,
    Reason.SESSION_EXPIRED: StatusCode.UNAUTHENTICATED,
    Reason.HYPERVISOR_MISMATCH: StatusCode.PERMISSION_DENIED,
    Reason.HYPERVISOR_REFUSED: StatusCode.PERMISSION_DENIED,
    Reason.VM_REFUSED: StatusCode.PERMISSION_DENIED,
    Reason.TOKEN_REFUSED: StatusCode.PERMISSION_DENIED,
    Reason.VM_ELSEWHERE: StatusCode.PERMISSION_DENIED,
    Reason.REQUEST_INVALID: StatusCode.INVALID_ARGUMENT,
    Reason.LOGIN_UNKNOWN: StatusCode.FAILED_PRECONDITION,
    Reason.LOGIN_REFUSED: StatusCode.PERMISSION_DENIED,
    Reason.TOO_MANY_LOGINS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_SESSIONS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_STREAMS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_CALLS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.OPENID_PROVIDER_UNAVAILABLE: StatusCode.UNAVAILABLE,
    Reason.DEADLINE_REQUIRED: StatusCode.INVALID_ARGUMENT,
    Reason.DEADLINE_EXCEEDED: StatusCode.DEADLINE_EXCEEDED,
    Reason.OPERATION_INVALID: StatusCode.INVALID_ARGUMENT,
    Reason.OPERATION_NOT_ALLOWED: StatusCode.PERMISSION_DENIED,
    Reason.REQUEST_ID_REUSED: StatusCode.INVALID_ARGUMENT,
    Reason.SLOT_BUSY: StatusCode.RESOURCE_EXHAUSTED,
    Reason.CARD_UNAVAILABLE: StatusCode.UNAVAILABLE,
    Reason.CARD_REFUSED: StatusCode.FAILED_PRECONDITION,
    Reason.CARD_NOT_IN_GRID: StatusCode.FAILED_PRECONDITION,
    Reason.NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.STATE_UNAVAILABLE: StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: StatusCode.UNAVAILABLE,
    Reason.INTERNAL: StatusCode.INTERNAL,
}

HTTP_STATUSES: Final[dict[StatusCode, int]] = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.INTERNAL: 500,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}


class Refusal(GoseError):
    """The grid says no, and why; ``retry_after`` (seconds) where waiting helps. ``detail`` goes to the log only."""

    def __init__(
        self, reason: Reason, message: str, *, retry_after: float | None = None, detail: str | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.detail = detail

    @property
    def code(self) -> StatusCode:
        """The gRPC status code."""
        return CODES[self.reason]

    @property
    def code_number(self) -> int:
        """The google.rpc.Code."""
        number: int = self.code.value[0]
        return number

    @property
    def http_status(self) -> int:
        """The HTTP status."""
        return HTTP_STATUSES[self.code]
