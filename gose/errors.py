"""The grid's errors. What a refusal looks like outside (gRPC code, HTTP status) is in the row of its reason: ``secfunet.rpc.reasons``.

A reason is for programs (google.rpc.ErrorInfo, domain ``gose.secfunet``; ``reason`` in the JSON of the HTTPS door). Where the true
reason would help an attacker more than a caller it stays in the log: a refused VM-Auth-Token is ``TOKEN_REFUSED`` outside, whatever
was wrong with it.
"""

from __future__ import annotations

from grpc import StatusCode

from secfunet.errors import SecFuNetError
from secfunet.rpc.facts import Facts
from secfunet.rpc.reasons import HTTP_STATUSES, Domain, Reason

__all__ = ["GoseError", "Reason", "Refusal"]


class GoseError(SecFuNetError):
    """Root of what the grid raises."""


class StartError(GoseError):
    """The grid cannot start; the message says why."""


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
        return self.reason.code

    @property
    def http_status(self) -> int:
        """The HTTP status."""
        return HTTP_STATUSES[self.code]

    @property
    def facts(self) -> Facts:
        """What of it leaves the grid."""
        return Facts.of(Domain.GRID, self.reason, self.message, self.retry_after)
