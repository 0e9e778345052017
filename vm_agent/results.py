"""From what the middleware answers to what a program gets: nothing that did not come out of a verified container.

The order is fixed: the trailer of the container is verified with the container authority's key, only then the body is decrypted, only
then the result is looked for, and it must name this request, its digest, this VM, this hypervisor and a time not long ago. Whatever
fails: AnswerRefusedError.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from secfunet.container import ContainerError, ContainerProfile, verify_container
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from secfunet.operation import MAX_AGE, check_result, parse_result_set
from secfunet.rpc.facts import from_failure
from secfunet.rpc.reasons import Domain
from vm_agent.batching import Ticket
from vm_agent.errors import AgentError, AnswerRefusedError, OperationFailedError, sent_again
from vm_agent.identity import VmIdentity
from vm_agent.options import ProfileName

log = logging.getLogger(__name__)

MAX_CONTAINERS = 64  # of one batch: each may come from another execution
MAX_CONTAINER_BYTES = 1 << 18


class ResultChecker:
    """Checks answers against the identity that dom0 last told."""

    def __init__(
        self,
        profile: ProfileName = "oaep-pss-sha256",
        *,
        identity: VmIdentity | None = None,
        clock: Callable[[], float] = time.time,
        max_age: float = MAX_AGE,
    ) -> None:
        self._profile = ContainerProfile.named(profile)
        self._clock = clock
        self._max_age = max_age
        self.identity = identity
        self.refused = 0  # answers

    def settle(
        self, tickets: Sequence[Ticket[operation_pb2.Operation]], untrusted: agent_pb2.OperateResponse
    ) -> dict[bytes, object | AgentError]:
        """The outcome of each operation of a batch: its output, or the error that its caller gets. Never raises."""
        result_sets = self.open_all(untrusted.results)
        failures = {failure.request_id: failure for failure in untrusted.failures}
        outcomes: dict[bytes, object | AgentError] = {}
        for ticket in tickets:
            output = self._output(ticket.request, result_sets)
            if output is not None:
                outcomes[ticket.request_id] = output
            elif ticket.request_id in failures:
                outcomes[ticket.request_id] = _failed(failures[ticket.request_id])
            else:
                self.refused += 1
                refused = self._refused(ticket.request, result_sets)
                log.warning("%s", refused, extra={"request_id": ticket.request_id.hex()})
                outcomes[ticket.request_id] = refused
        return outcomes

    def open_all(self, untrusted: Sequence[agent_pb2.SealedResults]) -> list[operation_pb2.ResultSet]:
        """What the good ones among these containers hold."""
        opened = []
        for sealed in untrusted[:MAX_CONTAINERS]:
            try:
                opened.append(self.open(sealed))
            except AnswerRefusedError:
                log.warning("a container was refused", extra={"size": len(sealed.container)})
        return opened

    def open(self, untrusted: agent_pb2.SealedResults) -> operation_pb2.ResultSet:
        """Verifies, then decrypts. Raises AnswerRefusedError, whatever the cause."""
        identity = self.identity
        if identity is None or len(untrusted.container) > MAX_CONTAINER_BYTES:
            raise AnswerRefusedError
        try:
            verified = verify_container(
                untrusted.container, identity.container_authority, identity.header_size, self._profile
            )
            return parse_result_set(verified.open(untrusted.content_key))
        except ContainerError:
            raise AnswerRefusedError from None

    def _output(
        self, operation: operation_pb2.Operation, result_sets: Sequence[operation_pb2.ResultSet]
    ) -> bytes | None:
        for result_set in result_sets:
            output = self._checked(operation, result_set, self._clock())
            if output is not None:
                return output
        return None

    def _refused(
        self, operation: operation_pb2.Operation, result_sets: Sequence[operation_pb2.ResultSet]
    ) -> AnswerRefusedError:
        """Why nothing of it was the answer, as far as that is a program's business: the time, if all else is right."""
        for result_set in result_sets:
            if self._checked(operation, result_set, result_set.time) is not None:
                return AnswerRefusedError.of_time(self._clock() - result_set.time, self._max_age)
        return AnswerRefusedError()

    def _checked(
        self, operation: operation_pb2.Operation, result_set: operation_pb2.ResultSet, now: float
    ) -> bytes | None:
        identity = self.identity
        if identity is None:
            return None
        try:
            return check_result(
                result_set,
                operation=operation,
                vmid=identity.vmid,
                hvid=identity.hvid,
                now=now,
                max_age=self._max_age,
            )
        except ContainerError:
            return None


def _failed(untrusted: operation_pb2.OperationFailure) -> AgentError:
    return sent_again(OperationFailedError(from_failure(untrusted, Domain.MIDDLEWARE)))
