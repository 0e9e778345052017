"""What can go wrong on the way to a grid, with the facts that a caller acts on."""

from __future__ import annotations

import grpc

from secfunet.errors import SecFuNetError
from secfunet.rpc.facts import MAX_MESSAGE, Facts
from secfunet.rpc.reasons import Domain, Healing, Reason, healing_of


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
    def facts(self) -> Facts:
        """What of it leaves a program."""
        domain = Domain.GRID if self.from_grid else Domain.MIDDLEWARE
        return Facts(self.code, domain, self.reason, str(self)[:MAX_MESSAGE], self.retry_after)

    @property
    def healing(self) -> Healing:
        """What makes the same request succeed later."""
        return healing_of(self.reason, self.code)


class GridRefusedError(GoseClientError):
    """The grid answered, and said no."""

    def __init__(self, reason: str, message: str, *, code: grpc.StatusCode, retry_after: float | None = None) -> None:
        super().__init__(reason, message, code=code, retry_after=retry_after, from_grid=True)


class GridUnavailableError(GoseClientError):
    """The grid could not be reached, or went away in the middle."""

    def __init__(self, message: str, *, reason: str = Reason.GRID_UNAVAILABLE, retry_after: float | None = 1.0) -> None:
        super().__init__(reason, message, code=grpc.StatusCode.UNAVAILABLE, retry_after=retry_after)


class GridUntrustedError(GoseClientError):
    """Whoever answered at the grid's address is not the grid, or the grid does not accept our card. Waiting does not help."""

    def __init__(self, message: str, *, reason: Reason = Reason.GRID_UNTRUSTED) -> None:
        """``reason``: HYPERVISOR_REFUSED for the second case."""
        super().__init__(reason, message, code=reason.code)


class HypervisorCardError(GoseClientError):
    """The hypervisor's own card refuses its service (a wrong or blocked PIN, no such identity). Waiting does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.HYPERVISOR_CARD_REFUSED, message, code=Reason.HYPERVISOR_CARD_REFUSED.code)


class ProtocolViolationError(GoseClientError):
    """The grid's answer is not what the protocol allows, or leads to a place that was not configured."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.GRID_PROTOCOL_VIOLATED, message, code=Reason.GRID_PROTOCOL_VIOLATED.code)


class DeadlineError(GoseClientError):
    """The caller's time ran out; ``cause`` says what it was spent on, if that is known."""

    def __init__(self, cause: BaseException | None = None) -> None:
        text = "the grid did not answer in time" + (f": {cause}" if cause is not None else "")
        super().__init__(Reason.DEADLINE_EXCEEDED, text, code=Reason.DEADLINE_EXCEEDED.code)
        self.cause = cause


class SessionClosedError(GoseClientError):
    """The session was closed here."""

    def __init__(self) -> None:
        super().__init__(Reason.SESSION_ENDED, "this session was closed", code=Reason.SESSION_ENDED.code)


class ContainerRefusedError(GoseClientError):
    """A container of no authority that this client knows, or whose key the card does not unwrap."""

    def __init__(self) -> None:
        super().__init__(Reason.CONTAINER_REFUSED, "the container is refused", code=Reason.CONTAINER_REFUSED.code)


class RequestInvalidError(GoseClientError):
    """The caller asked for something that is no request at all."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.REQUEST_INVALID, message, code=Reason.REQUEST_INVALID.code)
