"""A refusal as gRPC sees it: google.rpc.Status with ErrorInfo (domain ``gose.secfunet``) and, where waiting helps, RetryInfo."""

from __future__ import annotations

from typing import NoReturn

import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # googleapis-common-protos has no types
from grpc_status import rpc_status  # type: ignore[import-untyped] # grpcio-status has no types

from gose.errors import ERROR_DOMAIN, Refusal
from secfunet.gose.v1 import operation_pb2


def status_of(refusal: Refusal) -> status_pb2.Status:
    """The google.rpc.Status."""
    details = [any_pb2.Any()]
    details[0].Pack(error_details_pb2.ErrorInfo(domain=ERROR_DOMAIN, reason=refusal.reason.value))
    if refusal.retry_after is not None:
        details.append(any_pb2.Any())
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(int(refusal.retry_after * 1_000_000))
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=refusal.code_number, message=refusal.message, details=details)


async def abort(context: grpc.aio.ServicerContext[object, object], refusal: Refusal) -> NoReturn:
    """Ends the call with ``refusal``; raises grpc.aio.AbortError."""
    # In grpc.aio this is a coroutine, whatever the stubs say.
    await context.abort_with_status(rpc_status.to_status(status_of(refusal)))
    raise AssertionError("abort_with_status has returned")


def failure_of(request_id: bytes, refusal: Refusal) -> operation_pb2.OperationFailure:
    """The same for one operation of a batch."""
    return operation_pb2.OperationFailure(
        request_id=request_id,
        code=refusal.code_number,
        reason=refusal.reason.value,
        message=refusal.message,
        retry_after_ms=max(1, int(refusal.retry_after * 1000)) if refusal.retry_after is not None else 0,
    )
