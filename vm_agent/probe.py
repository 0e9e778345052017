"""Would an operation work now, and if not, which link of the chain is broken? One round trip to the VM's card, without an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from secfunet.operation import MAX_SKEW
from secfunet.rpc.reasons import Reason
from secfunet.service.shared import Shared
from vm_agent.errors import AgentError
from vm_agent.middleware_client import MiddlewareClient

STANDS: Final = 1.0  # seconds for which an answer stands
TIMEOUT: Final = 10.0  # seconds for the whole chain

_LINKS: Final = {
    "the VM's card": (Reason.CARD_UNAVAILABLE, Reason.CARD_REFUSED, Reason.CARD_NOT_IN_GRID, Reason.SLOT_BUSY),
    "the hypervisor's card": (Reason.HYPERVISOR_CARD_UNAVAILABLE, Reason.HYPERVISOR_CARD_REFUSED),
    "the token": (
        Reason.TOKEN_MISSING,
        Reason.TOKEN_EXPIRED,
        Reason.TOKEN_REFUSED,
        Reason.VM_REVOKED,
        Reason.VM_REFUSED,
        Reason.VM_ELSEWHERE,
    ),
    "the policy": (Reason.POLICY_INVALID, Reason.POLICY_DENIED),
    "the agent": (
        Reason.CERTIFICATE_REQUIRED,
        Reason.CERTIFICATE_FOREIGN,
        Reason.CERTIFICATE_EXPIRED,
        Reason.CERTIFICATE_NOT_CURRENT,
        Reason.IDENTITY_INVALID,
    ),
    "dom0": (
        Reason.MIDDLEWARE_UNAVAILABLE,
        Reason.DOMAIN_NOT_RUNNING,
        Reason.HYPERVISOR_UNAVAILABLE,
        Reason.AUDIT_UNAVAILABLE,
        Reason.STATE_UNAVAILABLE,
        Reason.INTERNAL,
    ),
}
_LINK_OF: Final = {str(reason): link for link, reasons in _LINKS.items() for reason in reasons}


class Broken(NamedTuple):
    """``link``: what does not work; ``reason``: as in errors."""

    link: str
    reason: str
    message: str


class Probe:
    """``client``: the present one, None while there is none; ``problem``: then, why. ``max_age``: of answers, seconds."""

    def __init__(
        self,
        client: Callable[[], MiddlewareClient | None],
        problem: Callable[[], AgentError],
        *,
        max_age: float,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._problem = problem
        self._max_age = max_age
        self._clock = clock
        self._shared = Shared(self._look, keep=STANDS)

    async def broken_link(self, timeout: float) -> Broken | None:
        """None: an operation would work now. Callers within a second share one look."""
        try:
            return await self._shared.answer(timeout)
        except TimeoutError:
            return Broken("the grid", Reason.DEADLINE_EXCEEDED, f"no answer within {timeout:g} seconds")

    async def _look(self) -> Broken | None:
        client = self._client()
        if client is None:
            problem = self._problem()
            return Broken("the agent", problem.reason, str(problem))
        try:
            there = await client.probe(TIMEOUT)
        except AgentError as error:
            return Broken(_LINK_OF.get(error.reason, "the grid"), error.reason, str(error))
        now = self._clock()
        if not now - self._max_age <= there <= now + MAX_SKEW:
            ahead = now - there
            how = f"{abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} the grid's"
            return Broken("the clock", Reason.ANSWER_REFUSED, f"this VM's clock is {how}: answers are refused")
        if client.problem is not None:
            return Broken("the agent", client.problem.reason, str(client.problem))
        if client.identity is not None and not client.identity.operations:
            return Broken("the policy", Reason.POLICY_DENIED, "neither the policy nor the token allows any operation")
        return None
