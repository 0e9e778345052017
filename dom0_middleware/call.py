"""Who calls, as dom0 established it before a handler runs; kept in a context variable for the time of the call."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from dom0_middleware.guest_authority import AgentCertificate


@dataclass(frozen=True)
class Call:
    """``correlation``: the id (``secfunet.rpc.correlation``) that names this call in the records of middleware and grid.

    A guest's call always gets one of our making, so that no guest can put the id of another one's call on its own lines; what it sent is
    ``guest_correlation`` (""), and is only ever recorded as that. An orchestrator may choose the id itself.

    ``certificate``: of the agent (None while it has none yet); ``caller``: the orchestrator's name ("" for agents), ``thumbprint``:
    of its certificate.
    """

    method: str
    correlation: str
    certificate: AgentCertificate | None = None
    caller: str = ""
    thumbprint: str = ""
    guest_correlation: str = ""


current_call: ContextVar[Call] = ContextVar("current_call")
