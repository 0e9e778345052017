"""What leaves a program of an error: code, domain, reason, message, and when to try again; and the same out of what another program said.

Two forms: a google.rpc.Status with ErrorInfo (and RetryInfo where waiting helps) for a call, an OperationFailure for one operation of a
batch. Both round a time up to whole milliseconds, and "at once" is 1 ms, since 0 in an OperationFailure means "not by waiting".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc

from secfunet.gose.v1 import operation_pb2
from secfunet.rpc.reasons import Domain, Healing, Reason, healing_of

if TYPE_CHECKING:
    import grpc.aio
    from google.rpc import status_pb2  # type: ignore[import-untyped] # googleapis-common-protos has no types

STATUS_KEY: Final = "grpc-status-details-bin"
MAX_MESSAGE: Final = 512  # characters
MAX_RETRY: Final = 3600.0  # seconds
MAX_STATUS: Final = 16384  # bytes
_MAX_DETAILS = 8
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_DOMAIN = re.compile(r"[a-z][a-z0-9.-]{0,63}")
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Facts:
    """``retry_after``: seconds after which it is worth to try again; 0: at once; None: waiting does not help."""

    code: grpc.StatusCode
    domain: str
    reason: str
    message: str
    retry_after: float | None = None

    @classmethod
    def of(cls, domain: Domain, reason: Reason, message: str = "", retry_after: float | None = None) -> Facts:
        """The facts of a reason of ours; its own sentence where there is no other message."""
        return cls(reason.code, domain, reason, message or reason.sentence, retry_after)

    @property
    def healing(self) -> Healing:
        """What makes the same request succeed later."""
        return healing_of(self.reason, self.code)

    def status(self) -> status_pb2.Status:
        """The google.rpc.Status."""
        # Late: what prints a version or a help text needs none of it.
        from google.rpc import error_details_pb2, status_pb2

        status = status_pb2.Status(code=code_number(self.code), message=self.message[:MAX_MESSAGE])
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(whole_milliseconds(self.retry_after))
            status.details.add().Pack(retry)
        return status

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What a call that ends with these facts carries."""
        return ((STATUS_KEY, bytes(self.status().SerializeToString())),)

    def failure(self, request_id: bytes = b"") -> operation_pb2.OperationFailure:
        """The same for one operation of a batch."""
        return operation_pb2.OperationFailure(
            request_id=request_id,
            code=code_number(self.code),
            domain=self.domain,
            reason=self.reason,
            message=self.message[:MAX_MESSAGE],
            retry_after_ms=whole_milliseconds(self.retry_after),
        )


def whole_milliseconds(retry_after: float | None) -> int:
    """Rounded up, at least 1; 0 for None."""
    if retry_after is None:
        return 0
    return max(1, math.ceil(round(min(max(retry_after, 0.0), MAX_RETRY) * 1000, 6)))


def whole_seconds(retry_after: float) -> int:
    """For HTTP's Retry-After: rounded up, at least 1."""
    return max(1, math.ceil(round(min(max(retry_after, 0.0), MAX_RETRY), 6)))


def code_number(code: grpc.StatusCode) -> int:
    """The google.rpc.Code."""
    number: int = code.value[0]
    return number


def code_of(untrusted_number: int) -> grpc.StatusCode:
    """The code of a failure with this number; UNKNOWN for one that does not exist, and for OK, which is no failure."""
    code = _CODES.get(untrusted_number, grpc.StatusCode.UNKNOWN)
    return grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code


def from_failure(untrusted: operation_pb2.OperationFailure, default: Domain) -> Facts:
    """Another program's OperationFailure; ``default``: the domain of one that names none. Never raises."""
    code = code_of(untrusted.code)
    return Facts(
        code,
        untrusted.domain if _DOMAIN.fullmatch(untrusted.domain) else default,
        untrusted.reason if _NAME.fullmatch(untrusted.reason) else code.name,
        _printable(untrusted.message),
        min(untrusted.retry_after_ms / 1000, MAX_RETRY) if untrusted.retry_after_ms > 0 else None,
    )


def from_status(untrusted: bytes | None) -> Facts | None:
    """Out of a serialised google.rpc.Status; None unless it is one with an ErrorInfo that names domain and reason. Never raises."""
    if not untrusted or len(untrusted) > MAX_STATUS:
        return None
    from google.rpc import error_details_pb2, status_pb2

    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after: float | None = None
    try:
        status = status_pb2.Status.FromString(untrusted)
        for detail in status.details[:_MAX_DETAILS]:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(retry.DESCRIPTOR):
                detail.Unpack(retry)
                delay = retry.retry_delay
                retry_after = min(max(delay.seconds + delay.nanos / 1e9, 0.0), MAX_RETRY)
    except Exception:  # noqa: BLE001 - protobuf's runtimes raise different errors for bytes that are not a message
        return None
    if not _NAME.fullmatch(info.reason) or not _DOMAIN.fullmatch(info.domain):
        return None
    return Facts(code_of(status.code), info.domain, info.reason, _printable(status.message), retry_after)


def from_error(error: grpc.RpcError, *domains: Domain) -> Facts | None:
    """What the other end of a call said when it ended; None if it was none of ``domains`` that spoke."""
    rpc: Any = error  # grpc.Call and AioRpcError share these methods, RpcError itself declares none
    details = next((value for key, value in rpc.trailing_metadata() or () if key == STATUS_KEY), None)
    facts = from_status(details if isinstance(details, bytes) else None)
    return facts if facts is not None and facts.domain in domains else None


async def abort(context: grpc.aio.ServicerContext[Any, Any], facts: Facts) -> NoReturn:
    """Ends the call with ``facts``; raises grpc.aio.AbortError."""
    await context.abort(facts.code, facts.message[:MAX_MESSAGE], trailing_metadata=facts.trailing_metadata())
    raise AssertionError("abort has returned")


def _printable(untrusted: str) -> str:
    """For logs and terminals."""
    return "".join(character if character.isprintable() else "?" for character in untrusted[:MAX_MESSAGE])
