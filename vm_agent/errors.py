"""What can go wrong in the agent, and the one table that turns it into a gRPC status for local programs."""

from __future__ import annotations

import time
from typing import Any

import grpc

from secfunet.errors import SecFuNetError
from secfunet.rpc.facts import Facts, from_error
from secfunet.rpc.reasons import Domain, Reason

UNREACHABLE = "the Secure Middleware cannot be reached: see that it runs in dom0, and that it started this VM (the agent goes on trying)"


class AgentError(SecFuNetError):
    """Root of the agent's errors. ``reason`` is for programs (UPPER_SNAKE_CASE), ``retry_after`` in seconds (None: not by waiting).

    ``detail`` is for the agent's log only: what a library said, which tells a person little.
    """

    code: grpc.StatusCode = Reason.INTERNAL.code
    domain: str = Domain.AGENT
    reason: str = Reason.INTERNAL
    retry_after: float | None = None
    detail = ""

    @property
    def facts(self) -> Facts:
        """What of it a local program is told."""
        return Facts(self.code, self.domain, self.reason, str(self), self.retry_after)


class JoinError(AgentError):
    """The join information that dom0 handed to this domain cannot be used."""

    code = Reason.JOIN_INVALID.code
    reason = Reason.JOIN_INVALID


class NotEnrolledError(AgentError):
    """The agent has no certificate (yet, or any more): it cannot speak for this VM."""

    code = Reason.NOT_ENROLLED.code
    reason = Reason.NOT_ENROLLED


class EnrolmentRefusedError(AgentError):
    """The middleware did not accept the join secret, or what it answered is no certificate for this agent."""

    code = Reason.ENROLMENT_REFUSED.code
    reason = Reason.ENROLMENT_REFUSED


class IdentityUnusableError(AgentError):
    """The middleware's word on who this VM is cannot be used (no VMID bound to the domain, or a certificate that does not parse)."""

    code = Reason.IDENTITY_INVALID.code
    reason = Reason.IDENTITY_INVALID


class UnavailableError(AgentError):
    """The middleware cannot be reached, or lost the connection: the same request may be sent again."""

    code = Reason.MIDDLEWARE_UNAVAILABLE.code
    reason: str = Reason.MIDDLEWARE_UNAVAILABLE
    retry_after = 1.0


class DeadlineError(AgentError):
    """No answer within the caller's time."""

    code = Reason.DEADLINE_EXCEEDED.code
    reason = Reason.DEADLINE_EXCEEDED


class OverloadedError(AgentError):
    """More callers wait than the agent's limit allows."""

    code = Reason.AGENT_BUSY.code
    reason = Reason.AGENT_BUSY
    retry_after = 0.5


class RequestError(AgentError):
    """A local program asked for something that is no operation: wrong length, unknown scheme."""

    code = Reason.OPERATION_INVALID.code
    reason = Reason.OPERATION_INVALID


class AnswerRefusedError(AgentError):
    """An answer came, and it is not what it should be. One error for every cause, but for the time of an answer that is right in all
    else: that is a clock that a person can set.
    """

    code = Reason.ANSWER_REFUSED.code
    reason = Reason.ANSWER_REFUSED

    def __init__(
        self, message: str = "the answer to this operation was refused: its container is not what it should be"
    ) -> None:
        super().__init__(message)

    @classmethod
    def of_time(cls, age: float, max_age: float) -> AnswerRefusedError:
        """For one that is ``age`` seconds old by this VM's clock."""
        when = f"{age:.0f} s ago" if age >= 0 else f"{-age:.0f} s in the future"
        return cls(
            f"the answer to this operation was refused: it was made {when} by this VM's clock, and {max_age:.0f} s are allowed; "
            "compare this VM's clock with dom0's"
        )


class OperationFailedError(AgentError):
    """The middleware or the grid refused one operation or failed at it, and said why."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts.message or f"refused: {facts.reason}")
        self.code = facts.code
        self.domain = facts.domain
        self.reason = facts.reason
        self.retry_after = facts.retry_after


PASSING = frozenset(
    {Reason.CERTIFICATE_EXPIRED, Reason.CERTIFICATE_NOT_CURRENT, Reason.DOMAIN_NOT_RUNNING, Reason.SESSION_ENDED}
)
"""Reasons that are about the agent's place in dom0 now, not about the operation: with the next certificate, run or session the same request
succeeds, and it may be sent again."""


def sent_again(error: AgentError) -> AgentError:
    """``error``, as one after which the same request is sent again if its reason passes."""
    if not isinstance(error, OperationFailedError) or error.reason not in PASSING:
        return error
    passing = UnavailableError(str(error))
    passing.domain, passing.reason = error.domain, error.reason
    return passing


# BoringSSL's words in what gRPC says of a failed handshake.
_TIMES = {"certificate is not yet valid": "is not yet valid", "certificate has expired": "has expired"}
_RETRYABLE = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL})


def from_rpc_error(error: grpc.RpcError) -> AgentError:
    """A failed call to the middleware as one of our errors; UnavailableError exactly if the same request may be sent again."""
    rpc: Any = error  # grpc.Call and AioRpcError share these methods, RpcError itself declares none
    code: grpc.StatusCode = rpc.code()
    details: str = rpc.details() or ""
    facts = from_error(error, Domain.MIDDLEWARE, Domain.GRID)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("the Secure Middleware gave no answer in time")
    if code is grpc.StatusCode.UNAVAILABLE and facts is not None:
        return UnavailableError(f"the Secure Middleware cannot help now: {details}")
    if code is grpc.StatusCode.UNAVAILABLE or (code in _RETRYABLE and facts is None):
        unreachable = UnavailableError(_wrong_clock(details) or UNREACHABLE)
        unreachable.detail = f"{code.name}: {details}"
        return unreachable
    return OperationFailedError(facts or Facts(code, Domain.MIDDLEWARE, code.name, details))


def _wrong_clock(untrusted_details: str) -> str:
    """A sentence if TLS did not accept the middleware's certificate for its time, else ""."""
    for text, meaning in _TIMES.items():
        if text in untrusted_details:
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            return (
                f"the certificate of the Secure Middleware {meaning} by this VM's clock ({now}): compare it with dom0's"
            )
    return ""
