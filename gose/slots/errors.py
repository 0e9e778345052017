"""Why a slot did not do a job."""

from __future__ import annotations

from typing import Final

from gose.errors import GoseError

SHORTEST_RETRY: Final = 0.01  # seconds that a refused caller is told to wait
LONGEST_RETRY: Final = 30.0


class SlotError(GoseError):
    """Root of what a slot raises itself; what the job raises comes out unchanged."""


class SlotBusyError(SlotError):
    """The queue before the card is full, or too long for the job's deadline; ``retry_after`` in seconds."""

    def __init__(self, name: str, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} jobs already wait for {name}")
        self.name = name
        self.waiting = waiting
        self.retry_after = min(max(SHORTEST_RETRY, retry_after), LONGEST_RETRY)


class SlotDeadlineError(SlotError):
    """The job's deadline passed before the card was free; the card has done nothing of it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the deadline passed while waiting for {name}")
        self.name = name


class CardUnavailableError(SlotError):
    """The card is out of service, or died with this job; ``retry_after`` in seconds until it is tried again."""

    def __init__(self, name: str, cause: str, retry_after: float) -> None:
        super().__init__(f"{name} is out of service: {cause}")
        self.name = name
        self.cause = cause
        self.retry_after = retry_after


class CardNotAdmittedError(SlotError):
    """The card answers, and must not be used: what it holds is not what the registry says, or was revoked."""

    def __init__(self, seid: str, cause: str) -> None:
        super().__init__(cause)
        self.seid = seid
        self.cause = cause


class SlotClosedError(SlotError):
    """The grid shuts down."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: the grid shuts down")
        self.name = name
