"""Who calls, as dom0 established it before a handler runs; kept in a context variable for the time of the call."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

from dom0_middleware.guest_authority import AgentCertificate

CORRELATION_KEY = "secfunet-correlation-id"
_CORRELATION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Call:
    """``correlation``: 16 hexadecimal digits that name this call in the records of agent, middleware and grid.

    ``certificate``: of the agent (None while it has none yet); ``caller``: the orchestrator's name ("" for agents).
    """

    method: str
    correlation: str
    certificate: AgentCertificate | None = None
    caller: str = ""


current_call: ContextVar[Call] = ContextVar("current_call")


def correlation_id(untrusted: str | bytes | None) -> str:
    """The caller's own id if it has the right form, else a new one."""
    if isinstance(untrusted, str) and _CORRELATION.fullmatch(untrusted):
        return untrusted
    return secrets.token_hex(8)
