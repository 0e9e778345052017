"""What the daemons wrote down: the story is told from their logs and the audit log, not from what ought to have happened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from demo.stack import Stack
from secfunet.errors import SecFuNetError

Record = dict[str, Any]


class NoEvidenceError(SecFuNetError):
    """Something that must have been written down was not."""


@dataclass(frozen=True, slots=True)
class LoginSeen:
    """A session of one VM, and the login of the hypervisor that it rests on, in the grid's words. Times in seconds."""

    hypervisor: str
    session: str
    seid: str
    to_login: float
    to_session: float
    resumed: bool
    for_this_vm: bool


@dataclass(frozen=True, slots=True)
class OperationSeen:
    """One operation, followed by its correlation id from dom0's audit to the slot of the card."""

    correlation: str
    audit_number: int
    decision: str
    operation: str
    scheme: str
    seid: str
    to_done: float


def records(path: Path) -> list[Record]:
    """The JSON lines of a log; other lines are passed over."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


def last_login(stack: Stack, vm: str) -> LoginSeen:
    """The latest session of ``vm`` and its login, which may have been made for a neighbour's session a moment before.

    Raises NoEvidenceError if the grid saw none.
    """
    log = records(stack.daemons["gose"].log)
    granted = _last(log, message="session granted", seid=vm)
    login = _last(log[: log.index(granted)], message="hypervisor logged in", hvid=granted["hvid"])
    asked, begun = (_last(log, message="login begun", correlation=one["correlation"]) for one in (login, granted))
    return LoginSeen(
        hypervisor=login["hypervisor"],
        session=granted["session"],
        seid=granted["seid"],
        to_login=_time(login) - _time(asked),
        to_session=_time(granted) - _time(begun),
        resumed=login["resumed"],
        for_this_vm=login["correlation"] == granted["correlation"],
    )


def last_operation(stack: Stack, vm: str) -> OperationSeen:
    """The latest operation of ``vm``. Raises NoEvidenceError if audit and grid do not both tell of it."""
    audit = records(stack.layout.host(stack.host) / "state" / "audit.jsonl")
    decided = _last(audit, action="operation", name=vm)
    batch = decided["correlation"].partition("-")[0]  # dom0 numbers the operations of a batch under the batch's id
    done = _last(records(stack.daemons["gose"].log), message="operations done", correlation=batch)
    if decided["request"] not in done["done"]:
        raise NoEvidenceError(f"the grid did not do what record {decided['n']} of the audit log permitted")
    return OperationSeen(
        correlation=decided["correlation"],
        audit_number=decided["n"],
        decision=decided["decision"],
        operation=decided["operation"],
        scheme=decided["scheme"],
        seid=done["seid"],
        to_done=_time(done) - decided["time"],
    )


def _last(log: list[Record], **wanted: str) -> Record:
    for entry in reversed(log):
        if all(entry.get(key) == value for key, value in wanted.items()):
            return entry
    raise NoEvidenceError(f"no daemon wrote down: {wanted}")


def _time(entry: Record) -> float:
    return datetime.fromisoformat(entry["time"]).timestamp()
