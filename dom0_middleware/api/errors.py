"""The one table from errors to gRPC statuses: google.rpc.Status with ErrorInfo, and RetryInfo where waiting helps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # it ships no types

from dom0_middleware.errors import GridFailed, MiddlewareError, Reason
from gose_client.errors import GoseClientError
from secfunet.apdu import ApduError
from secfunet.card.errors import CardError
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import operation_pb2

DOMAIN = "middleware.secfunet"
GRID_DOMAIN = "gose.secfunet"
STATUS_KEY = "grpc-status-details-bin"
_MAX_MESSAGE = 512  # characters
_INTERNAL_MESSAGE = "a fault of the middleware; its log says more"

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.DEADLINE_REQUIRED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.REQUEST_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.OPERATION_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CSR_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.VM_CERTIFICATE_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CERTIFICATE_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    Reason.CERTIFICATE_FOREIGN: grpc.StatusCode.PERMISSION_DENIED,
    Reason.CERTIFICATE_NOT_CURRENT: grpc.StatusCode.UNAUTHENTICATED,
    Reason.CERTIFICATE_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.JOIN_SECRET_REFUSED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.CHANNEL_FOREIGN: grpc.StatusCode.PERMISSION_DENIED,
    Reason.CHANNEL_FLOODED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.ORCHESTRATOR_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.DESTINATION_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.POLICY_INVALID: grpc.StatusCode.PERMISSION_DENIED,
    Reason.POLICY_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_OPERATIONS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_STREAMS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOKEN_MISSING: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.TOKEN_EXPIRED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.OPERATION_NOT_AUTHORISED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.VM_REVOKED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.DOMAIN_NOT_RUNNING: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SESSION_ENDED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.VM_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.VM_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.VM_STATE_WRONG: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BINDING_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.HYPERVISOR_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.HYPERVISOR_REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.AUDIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.STATE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.GRID_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.CARD_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.WATCHER_TOO_SLOW: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class ErrorFacts:
    """What of an error leaves the daemon. ``retry_after``: seconds, or None."""

    code: grpc.StatusCode
    domain: str
    reason: str
    message: str
    retry_after: float | None

    def status(self) -> status_pb2.Status:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        _pack(status.details.add(), error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(math.ceil(self.retry_after * 1000))
            _pack(status.details.add(), error_details_pb2.RetryInfo(retry_delay=delay))
        return status

    def failure(self, request_id: bytes) -> operation_pb2.OperationFailure:
        return operation_pb2.OperationFailure(
            request_id=request_id,
            code=self.code.value[0],
            reason=self.reason,
            message=self.message,
            retry_after_ms=math.ceil(self.retry_after * 1000) if self.retry_after is not None else 0,
        )


def facts_of(error: Exception) -> ErrorFacts:
    """Total: what is nobody's refusal is INTERNAL, and its text stays here."""
    if isinstance(error, GridFailed):
        code = _BY_NUMBER.get(error.code, grpc.StatusCode.UNKNOWN)
        return ErrorFacts(code, GRID_DOMAIN, error.grid_reason, str(error)[:_MAX_MESSAGE], error.retry_after)
    if isinstance(error, MiddlewareError):
        return _own(error.reason, str(error), error.retry_after)
    if isinstance(error, GoseClientError):
        domain = GRID_DOMAIN if error.from_grid else DOMAIN
        return ErrorFacts(error.code, domain, error.reason, str(error)[:_MAX_MESSAGE], error.retry_after)
    if isinstance(error, CardError | ApduError):
        return _own(Reason.CARD_UNAVAILABLE, "the hypervisor's card cannot be used now", 1.0)
    return _own(Reason.INTERNAL, _INTERNAL_MESSAGE, None)


def reason_of(error: SecFuNetError) -> str:
    """What the error is called in the audit log."""
    return facts_of(error).reason


def _own(reason: Reason, message: str, retry_after: float | None) -> ErrorFacts:
    return ErrorFacts(CODES[reason], DOMAIN, str(reason), message[:_MAX_MESSAGE], retry_after)


def _pack(into: any_pb2.Any, message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> None:
    into.Pack(message)
