"""What can go wrong on the way to a grid, with the facts that a caller acts on."""

from __future__ import annotations

from typing import Final

import grpc

from secfunet.errors import SecFuNetError

OVERLOAD: Final = frozenset({"SLOT_BUSY", "TOO_MANY_CALLS", "TOO_MANY_STREAMS", "TOO_MANY_SESSIONS", "TOO_MANY_LOGINS"})
"""The grid's reasons of RESOURCE_EXHAUSTED: nothing was done, and ``retry_after`` says when there will be room."""


class GoseClientError(SecFuNetError):
    """The root of this package's errors.

    ``reason`` is UPPER_SNAKE_CASE, the grid's own where the grid spoke (``from_grid``); ``code`` is the gRPC code that fits it;
    ``retry_after`` seconds after which it is worth to try again, None where waiting does not help.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        code: grpc.StatusCode,
        retry_after: float | None = None,
        from_grid: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.retry_after = retry_after
        self.from_grid = from_grid

    @property
    def code_number(self) -> int:
        """The google.rpc.Code."""
        number: int = self.code.value[0]
        return number


class GridRefusedError(GoseClientError):
    """The grid answered, and said no."""

    def __init__(self, reason: str, message: str, *, code: grpc.StatusCode, retry_after: float | None = None) -> None:
        super().__init__(reason, message, code=code, retry_after=retry_after, from_grid=True)


class GridUnavailableError(GoseClientError):
    """The grid could not be reached, or went away in the middle."""

    def __init__(self, message: str, *, reason: str = "GRID_UNAVAILABLE", retry_after: float | None = 1.0) -> None:
        super().__init__(reason, message, code=grpc.StatusCode.UNAVAILABLE, retry_after=retry_after)


class GridUntrustedError(GoseClientError):
    """Whoever answered at the grid's address is not the grid, or the grid does not accept our card. Waiting does not help."""

    def __init__(self, message: str) -> None:
        super().__init__("GRID_UNTRUSTED", message, code=grpc.StatusCode.FAILED_PRECONDITION)


class HypervisorCardError(GoseClientError):
    """The hypervisor's own card refuses its service (a wrong or blocked PIN, no such identity). Waiting does not help."""

    def __init__(self, message: str) -> None:
        super().__init__("HYPERVISOR_CARD_REFUSED", message, code=grpc.StatusCode.FAILED_PRECONDITION)


class ProtocolViolationError(GoseClientError):
    """The grid's answer is not what the protocol allows, or leads to a place that was not configured."""

    def __init__(self, message: str) -> None:
        super().__init__("GRID_PROTOCOL_VIOLATED", message, code=grpc.StatusCode.INTERNAL)


class DeadlineError(GoseClientError):
    """The caller's time ran out; ``cause`` says what it was spent on, if that is known."""

    def __init__(self, cause: BaseException | None = None) -> None:
        text = "the grid did not answer in time" + (f": {cause}" if cause is not None else "")
        super().__init__("DEADLINE_EXCEEDED", text, code=grpc.StatusCode.DEADLINE_EXCEEDED)
        self.cause = cause


class SessionClosedError(GoseClientError):
    """The session was closed here."""

    def __init__(self) -> None:
        super().__init__("SESSION_CLOSED", "this session was closed", code=grpc.StatusCode.FAILED_PRECONDITION)


class ContainerRefusedError(GoseClientError):
    """A container of no authority that this client knows, or whose key the card does not unwrap."""

    def __init__(self) -> None:
        super().__init__("CONTAINER_REFUSED", "the container is refused", code=grpc.StatusCode.INVALID_ARGUMENT)


class RequestInvalidError(GoseClientError):
    """The caller asked for something that is no request at all."""

    def __init__(self, message: str) -> None:
        super().__init__("REQUEST_INVALID", message, code=grpc.StatusCode.INVALID_ARGUMENT)
