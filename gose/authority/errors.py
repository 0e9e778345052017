"""What the authority refuses."""

from __future__ import annotations

from pathlib import Path

from gose.errors import GoseError


class AuthorityError(GoseError):
    """Root of the authority's errors."""


class AuthorityExistsError(AuthorityError):
    """``gose init`` was asked to make an authority where there is one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder} holds this grid's authority already, and it is never overwritten: every certificate, token and container "
            "depends on it. To start a new grid, name another 'state' folder in the settings. "
            "To give the servers new certificates (after a change of 'names'), run 'gose renew-servers'"
        )
        self.folder = folder


class AuthorityMissingError(AuthorityError):
    """There is no authority yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} holds no authority yet: run 'gose init' first")
        self.folder = folder


class AuthorityDamagedError(AuthorityError):
    """A file of the authority does not hold what it should."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}: restore the folder from a backup")
        self.path = path


class IssuanceError(AuthorityError):
    """The CA does not sign that; the message says why."""


class EnrolmentError(AuthorityError):
    """A card was not personalised; the message says why, and what to do."""


class CardInUseError(EnrolmentError):
    """Somebody else uses the card; the message says who may be asked to stop."""


class TokenNotIssuedError(AuthorityError):
    """No token for that VM and hypervisor; the message says why."""
