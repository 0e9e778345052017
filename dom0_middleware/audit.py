"""What dom0 records of its decisions: the records of the audit log of this daemon (``secfunet.service.audit`` is the log itself)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dom0_middleware.errors import Reason, Unavailable
from secfunet.rpc.reasons import Domain
from secfunet.service.audit import AuditLog, Record

log = logging.getLogger(__name__)


class Action(StrEnum):
    """Everything that is recorded."""

    # Of a guest.
    OPERATION = "operation"
    CALL = "call"
    ENROL = "enrol"
    RENEW = "renew"
    CHANNEL_REFUSED = "channel.refused"
    CHANNEL_ENDED = "channel.ended"
    # Of an orchestrator.
    VM_CREATE = "vm.create"
    VM_START = "vm.start"
    VM_INVITE = "vm.invite"
    VM_STOP = "vm.stop"
    VM_REVOKE = "vm.revoke"
    VM_DELETE = "vm.delete"
    VM_MIGRATE = "vm.migrate"
    VM_EXPECT = "vm.expect"
    # Of a domain.
    VM_ARRIVED = "vm.arrived"
    VM_LEFT = "vm.left"
    # Of the daemon.
    DAEMON_START = "daemon.start"
    DAEMON_STOP = "daemon.stop"
    POLICY_READ = "policy.read"
    ORCHESTRATORS_READ = "orchestrators.read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program in a VM, as the agent there saw it: a guest's word. ``executable``: its path."""

    uid: int
    pid: int
    executable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRecord(Record):
    """``vm``: the domain's UUID; ``name``: of the VM. ``caller``: an orchestrator's name, ``certificate``: the thumbprint (x5t#S256) of the
    certificate that it came with.

    ``guest_correlation``: an id that the guest chose; ``program``: which of its programs asks. ``request``: a request id in hexadecimal;
    ``digest``: what is to be signed, in hexadecimal; ``batch``: operations that came together.
    """

    vm: str = ""
    caller: str = ""
    certificate: str = ""
    guest_correlation: str = ""
    program: Program | None = None
    operation: str = ""
    scheme: str = ""
    request: str = ""
    digest: str = ""
    batch: int | None = None

    def __post_init__(self) -> None:
        """A reason without a domain is one of the middleware's own."""
        if self.reason and not self.domain:
            object.__setattr__(self, "domain", str(Domain.MIDDLEWARE))


def open_audit_log(path: Path, *, clock: Callable[[], float], sync_interval: float = 1.0) -> AuditLog:
    """The log of a daemon; not yet opened. What cannot be recorded is refused as Unavailable (AUDIT_UNAVAILABLE)."""
    return AuditLog(path, clock=clock, sync_interval=sync_interval, unavailable=_unavailable)


def _unavailable(cause: OSError | None) -> Unavailable:
    if cause is not None:
        log.error("the audit log cannot be written: %s", cause)
    return Unavailable(Reason.AUDIT_UNAVAILABLE, "the decision cannot be recorded, so nothing is done", retry_after=5.0)
