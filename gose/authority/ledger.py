"""What the authority does is on record before anybody has it: the audit log of a grid (``secfunet.service.audit`` is the log itself).

It lies in the grid's state folder. Who is given a right gets nothing that is not on record; taking a right away needs no room on a disk.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from gose.errors import GoseError
from secfunet.errors import SecFuNetError
from secfunet.identity import Role
from secfunet.service.audit import Actor, AuditError, AuditJournal, Record

FILE: Final = "audit.jsonl"


class Action(StrEnum):
    """Every act that gives rights, or takes them."""

    INIT = "authority.init"
    CERTIFICATE = "certificate.issue"
    ENROL = "enrol"
    BIND = "vm.bind"
    UNBIND = "vm.unbind"
    TOKEN = "token.issue"  # noqa: S105 - a name, no password
    USER_TOKEN_AUTHORITY = "user-token.authority"  # noqa: S105 - likewise
    USER_TOKEN = "user-token.issue"  # noqa: S105 - likewise
    REVOKE_TOKEN = "token.revoke"  # noqa: S105 - likewise
    REVOKE = "revoke"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityRecord(Record):
    """``name``: of the holder, whose ``role`` that is; of a user's token. ``thumbprint``: of his certificate (x5t#S256), ``seid``: of the
    secure element with his key. ``hypervisor``: for which it is. ``jti``: of a VM-Auth-Token. ``until``: UTC seconds.
    """

    role: Role | None = None
    seid: str = ""
    thumbprint: str = ""
    hypervisor: str = ""
    jti: str = ""
    operations: str = ""
    until: int | None = None


OnRecord = Callable[[AuthorityRecord], None]
"""Puts it on record. Raises AuditError: then the act must not take place."""


def unrecorded(_: AuthorityRecord) -> None:
    """For an authority that is still being made."""


class NotOnRecordError(GoseError):
    """A right was taken away, and that could not be put on record."""


class Ledger:
    """The audit log of the grid with this state folder, as its commands write it."""

    def __init__(self, state: Path) -> None:
        self._journal = AuditJournal(state / FILE)

    def record(self, record: AuthorityRecord) -> None:
        """Puts an act of the user of this process on record, on disk. Raises AuditError."""
        self._journal.append(replace(record, actor=Actor.of_this_process()))

    @contextlib.contextmanager
    def attempt(self, attempted: AuthorityRecord) -> Iterator[None]:
        """What the block does not manage, for whatever reason, is on record as failed, with what it says: "permitted" may stand there."""
        try:
            yield
        except AuditError:
            raise
        except BaseException as error:
            # An interrupt and a fault of this program say nothing that is worth keeping.
            detail = str(error) if isinstance(error, SecFuNetError | OSError | sqlite3.Error) else type(error).__name__
            with contextlib.suppress(AuditError):
                self.record(replace(attempted, decision="failed", detail=detail))
            raise

    @contextlib.contextmanager
    def taking_away(self, record: AuthorityRecord) -> Iterator[None]:
        """For a block that takes a right away: it is done in any case. Raises NotOnRecordError behind it if that is not on record."""
        problem = None
        try:
            self.record(record)
        except AuditError as error:
            problem = error
        with self.attempt(record):
            yield
        if problem is not None:
            raise NotOnRecordError(f"it is done, and not on record: {problem}") from problem
