"""What can go wrong in the agent, and the one table that turns it into a gRPC status for local programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from secfunet.errors import SecFuNetError

ERROR_DOMAIN = "agent.secfunet"
UNREACHABLE = "the Secure Middleware cannot be reached: see that it runs in dom0, and that it started this VM (the agent goes on trying)"


class AgentError(SecFuNetError):
    """Root of the agent's errors. ``reason`` is for programs (UPPER_SNAKE_CASE), ``retry_after`` in seconds (0: not by waiting).

    ``detail`` is for the agent's log only: what a library said, which tells a person little.
    """

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"
    retry_after = 0.0
    detail = ""


class JoinError(AgentError):
    """The join information that dom0 handed to this domain cannot be used."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "JOIN_INVALID"


class NotEnrolledError(AgentError):
    """The agent has no certificate (yet, or any more): it cannot speak for this VM."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_ENROLLED"


class EnrolmentRefusedError(AgentError):
    """The middleware did not accept the join secret, or what it answered is no certificate for this agent."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ENROLMENT_REFUSED"


class IdentityUnusableError(AgentError):
    """The middleware's word on who this VM is cannot be used (no VMID bound to the domain, or a certificate that does not parse)."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "IDENTITY_INVALID"


class UnavailableError(AgentError):
    """The middleware cannot be reached, or lost the connection: the same request may be sent again."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "MIDDLEWARE_UNAVAILABLE"
    retry_after = 1.0


class DeadlineError(AgentError):
    """No answer within the caller's time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class OverloadedError(AgentError):
    """More callers wait than the agent's limit allows."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "AGENT_BUSY"
    retry_after = 0.5


class RequestError(AgentError):
    """A local program asked for something that is no operation: wrong length, unknown scheme."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "OPERATION_INVALID"


class AnswerRefusedError(AgentError):
    """An answer came, and it is not what it should be. One error for every cause: which check failed is nobody's business."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "ANSWER_REFUSED"

    def __init__(self) -> None:
        super().__init__("the answer to this operation was refused: its container is not what it should be")


class OperationFailedError(AgentError):
    """The middleware or the grid refused one operation or failed at it, and said why."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message or f"refused: {reason}")
        self.code = code
        self.reason = reason
        self.retry_after = retry_after


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_RETRYABLE = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL})


def status_code(number: int) -> grpc.StatusCode:
    """The gRPC status with this number (google.rpc.Code); UNKNOWN for one that does not exist, and for OK, which is no failure."""
    code = _CODES.get(number, grpc.StatusCode.UNKNOWN)
    return grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """What a google.rpc.Status in a call's trailing metadata tells besides code and message."""

    reason: str = ""
    retry_after: float = 0.0


def facts_of(untrusted_status: bytes | None) -> ErrorFacts:
    """Reads ErrorInfo and RetryInfo out of ``grpc-status-details-bin``; whatever is not understood is left out."""
    if not untrusted_status or len(untrusted_status) > 16384:
        return ErrorFacts()
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # no stubs are published

    reason, retry_after = "", 0.0
    try:
        status = status_pb2.Status.FromString(untrusted_status)
        for detail in status.details[:8]:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                reason = info.reason[:64]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after = min(max(delay.seconds + delay.nanos / 1e9, 0.0), 3600.0)
    except DecodeError:
        return ErrorFacts()
    return ErrorFacts(reason, retry_after)


def status_details(code: grpc.StatusCode, reason: str, message: str, retry_after: float = 0.0) -> bytes:
    """A google.rpc.Status with ErrorInfo (and RetryInfo): the value of ``grpc-status-details-bin``."""
    from google.rpc import error_details_pb2, status_pb2

    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    if retry_after > 0:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after * 1e9))
        status.details.add().Pack(retry)
    return bytes(status.SerializeToString())


def from_rpc_error(error: grpc.RpcError) -> AgentError:
    """A failed call to the middleware as one of our errors; UnavailableError exactly if the same request may be sent again."""
    rpc: Any = error  # grpc.Call and AioRpcError share these methods, RpcError itself declares none
    code: grpc.StatusCode = rpc.code()
    details: str = rpc.details() or ""
    metadata = rpc.trailing_metadata() or ()
    facts = facts_of(next((bytes(value) for key, value in metadata if key == "grpc-status-details-bin"), None))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("the Secure Middleware gave no answer in time")
    if code is grpc.StatusCode.UNAVAILABLE and facts.reason:
        return UnavailableError(f"the Secure Middleware cannot help now: {details}")
    if code is grpc.StatusCode.UNAVAILABLE or (code in _RETRYABLE and not facts.reason):
        unreachable = UnavailableError(UNREACHABLE)
        unreachable.detail = f"{code.name}: {details}"
        return unreachable
    return OperationFailedError(code, facts.reason or code.name, details, facts.retry_after)
