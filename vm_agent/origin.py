"""Whence an operation comes: the id of the call, and the program that asked, as this VM's kernel names it.

The id leads from the agent's log line (uid, pid, executable) to dom0's audit log, where it stands as this guest's word
(``guest_correlation``, ``program``) beside the id of dom0's own making, which the grid's log has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from secfunet.middleware.v1 import agent_pb2
from secfunet.rpc.correlation import with_id
from secfunet.service.rate import TokenBuckets
from vm_agent.local_socket import Caller

LINES_PER_SECOND: Final = 20.0  # for one user, on the long run: a line an operation, but no flood
LINES_AT_ONCE: Final = 200.0
_HAS_ID: Final = re.compile(r"\(id [A-Za-z0-9-]{1,64}\)$")


@dataclass(frozen=True, slots=True)
class Origin:
    """``caller``: None for what did not come through the door (tests)."""

    correlation: str
    caller: Caller | None

    @property
    def uid(self) -> int | None:
        return self.caller.uid if self.caller is not None else None

    def message(self) -> agent_pb2.Origin:
        """For dom0."""
        who = self.caller
        return agent_pb2.Origin(
            correlation_id=self.correlation,
            uid=who.uid if who is not None else 0,
            pid=max(0, who.pid) if who is not None else 0,
            executable=who.executable if who is not None else "",
        )

    def facts(self) -> dict[str, object]:
        """For the log."""
        who = self.caller
        return {
            "correlation": self.correlation,
            "uid": who.uid if who is not None else None,
            "pid": who.pid if who is not None else None,
            "executable": who.executable if who is not None else "",
        }

    def told(self, message: str) -> str:
        """A message of the agent's own with the id; what dom0 said has one of its making already."""
        return message if _HAS_ID.search(message) else with_id(message, self.correlation)


current_origin: ContextVar[Origin] = ContextVar("vm_agent_origin")


def bounded_lines() -> Callable[[Origin], bool]:
    """Whether a line may be written for that caller's operation now."""
    buckets = TokenBuckets(LINES_PER_SECOND, LINES_AT_ONCE)
    return lambda origin: not buckets.take(str(origin.uid))
