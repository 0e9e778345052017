"""Every reason for which one of our programs refuses or fails: one row each, and nowhere else.

A reason is for programs (google.rpc.ErrorInfo, OperationFailure, the audit log). A name has one meaning, whichever program says it, and a
meaning has one name; the domain says which program spoke. docs/protocols.md has the same table with what a caller should do, and
a test compares the two.
"""

from __future__ import annotations

from enum import Enum, StrEnum, unique
from typing import Final, Self

from grpc import StatusCode


class Domain(StrEnum):
    """Who gives a reason: ``google.rpc.ErrorInfo.domain``."""

    GRID = "gose.secfunet"
    MIDDLEWARE = "middleware.secfunet"
    AGENT = "agent.secfunet"


class Healing(Enum):
    """What makes the same request succeed later."""

    NONE = "nothing that the caller could wait for"
    TIME = "waiting: the cause goes away"
    ROOM = "waiting: there was too much to do, and nothing was done"
    LOGIN = "a new login"


GRID: Final = (Domain.GRID,)
MIDDLEWARE: Final = (Domain.MIDDLEWARE,)
AGENT: Final = (Domain.AGENT,)
GRID_AND_MIDDLEWARE: Final = (Domain.GRID, Domain.MIDDLEWARE)
ALL: Final = (Domain.GRID, Domain.MIDDLEWARE, Domain.AGENT)

HTTP_STATUSES: Final[dict[StatusCode, int]] = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.INTERNAL: 500,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}


@unique
class Reason(StrEnum):
    """A row: name, the domains that use it, gRPC code, the sentence that a guest is told, and what heals it.

    The sentence is fixed, so it can tell nothing of what lies behind: no address, no file, no count.
    """

    domains: tuple[Domain, ...]
    code: StatusCode
    sentence: str
    healing: Healing

    def __new__(
        cls,
        name: str,
        domains: tuple[Domain, ...],
        code: StatusCode,
        sentence: str,
        healing: Healing = Healing.NONE,
    ) -> Self:
        reason = str.__new__(cls, name)
        reason._value_ = name
        reason.domains = domains
        reason.code = code
        reason.sentence = sentence
        reason.healing = healing
        return reason

    # The request itself.
    REQUEST_INVALID = (
        "REQUEST_INVALID",
        GRID_AND_MIDDLEWARE,
        StatusCode.INVALID_ARGUMENT,
        "the request is not well-formed",
    )
    OPERATION_INVALID = (
        "OPERATION_INVALID",
        ALL,
        StatusCode.INVALID_ARGUMENT,
        "the key cannot do this operation; compare scheme, length and content with the key",
    )
    REQUEST_ID_REUSED = (
        "REQUEST_ID_REUSED",
        GRID,
        StatusCode.INVALID_ARGUMENT,
        "the request id was used for another operation",
    )
    DEADLINE_REQUIRED = (
        "DEADLINE_REQUIRED",
        GRID_AND_MIDDLEWARE,
        StatusCode.INVALID_ARGUMENT,
        "the call needs a deadline of at most an hour",
    )
    DEADLINE_EXCEEDED = (
        "DEADLINE_EXCEEDED",
        ALL,
        StatusCode.DEADLINE_EXCEEDED,
        "there was no answer in time",
        Healing.TIME,
    )
    CSR_INVALID = (
        "CSR_INVALID",
        MIDDLEWARE,
        StatusCode.INVALID_ARGUMENT,
        "the certificate signing request is not usable",
    )
    VM_CERTIFICATE_INVALID = (
        "VM_CERTIFICATE_INVALID",
        MIDDLEWARE,
        StatusCode.INVALID_ARGUMENT,
        "the VM's certificate is not usable",
    )
    TOKEN_INVALID = (
        "TOKEN_INVALID",
        MIDDLEWARE,
        StatusCode.INVALID_ARGUMENT,
        "the VM-Auth-Token is not usable",
    )
    NOT_FOUND = ("NOT_FOUND", GRID, StatusCode.NOT_FOUND, "there is nothing here")
    # Who calls.
    CERTIFICATE_REQUIRED = (
        "CERTIFICATE_REQUIRED",
        GRID_AND_MIDDLEWARE,
        StatusCode.UNAUTHENTICATED,
        "this call needs a client certificate",
    )
    CERTIFICATE_FOREIGN = (
        "CERTIFICATE_FOREIGN",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the certificate is that of another domain",
    )
    CERTIFICATE_NOT_CURRENT = (
        "CERTIFICATE_NOT_CURRENT",
        MIDDLEWARE,
        StatusCode.UNAUTHENTICATED,
        "the certificate is of an earlier run of this domain, or was replaced",
    )
    CERTIFICATE_EXPIRED = (
        "CERTIFICATE_EXPIRED",
        MIDDLEWARE,
        StatusCode.UNAUTHENTICATED,
        "the certificate has expired",
    )
    JOIN_SECRET_REFUSED = (
        "JOIN_SECRET_REFUSED",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the join secret is refused",
    )
    CHANNEL_FOREIGN = (
        "CHANNEL_FOREIGN",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the connection is not the domain's",
    )
    CHANNEL_FLOODED = (
        "CHANNEL_FLOODED",
        MIDDLEWARE,
        StatusCode.RESOURCE_EXHAUSTED,
        "the domain sends more over its channel than it may",
        Healing.ROOM,
    )
    ORCHESTRATOR_NOT_ALLOWED = (
        "ORCHESTRATOR_NOT_ALLOWED",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "this orchestrator is not among the allowed ones",
    )
    SESSION_REQUIRED = (
        "SESSION_REQUIRED",
        GRID,
        StatusCode.UNAUTHENTICATED,
        "the call must carry one session",
    )
    SESSION_UNKNOWN = (
        "SESSION_UNKNOWN",
        GRID,
        StatusCode.UNAUTHENTICATED,
        "there is no such session with the grid any more",
        Healing.LOGIN,
    )
    SESSION_EXPIRED = (
        "SESSION_EXPIRED",
        GRID,
        StatusCode.UNAUTHENTICATED,
        "the session with the grid has expired",
        Healing.LOGIN,
    )
    HYPERVISOR_MISMATCH = (
        "HYPERVISOR_MISMATCH",
        GRID,
        StatusCode.PERMISSION_DENIED,
        "this belongs to another hypervisor",
    )
    HYPERVISOR_REFUSED = (
        "HYPERVISOR_REFUSED",
        GRID_AND_MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the grid does not admit this hypervisor",
    )
    VM_REFUSED = ("VM_REFUSED", GRID, StatusCode.PERMISSION_DENIED, "the grid does not admit this VM")
    VM_ELSEWHERE = (
        "VM_ELSEWHERE",
        GRID,
        StatusCode.PERMISSION_DENIED,
        "this VM has used a newer token from another hypervisor",
    )
    LOGIN_UNKNOWN = (
        "LOGIN_UNKNOWN",
        GRID,
        StatusCode.FAILED_PRECONDITION,
        "the grid does not know this login",
        Healing.LOGIN,
    )
    LOGIN_REFUSED = (
        "LOGIN_REFUSED",
        GRID,
        StatusCode.PERMISSION_DENIED,
        "the grid refused the hypervisor's login",
    )
    # What it may do.
    TOKEN_REFUSED = ("TOKEN_REFUSED", GRID, StatusCode.PERMISSION_DENIED, "the VM-Auth-Token is refused")
    TOKEN_EXPIRED = ("TOKEN_EXPIRED", MIDDLEWARE, StatusCode.PERMISSION_DENIED, "the VM-Auth-Token has expired")
    TOKEN_NOT_YET_VALID = (
        "TOKEN_NOT_YET_VALID",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the VM-Auth-Token is not valid yet",
    )
    TOKEN_MISSING = (
        "TOKEN_MISSING",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "this VM has no VM-Auth-Token",
    )
    OPERATION_NOT_ALLOWED = (
        "OPERATION_NOT_ALLOWED",
        GRID_AND_MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the VM-Auth-Token does not cover this operation",
    )
    VM_REVOKED = ("VM_REVOKED", MIDDLEWARE, StatusCode.PERMISSION_DENIED, "this VM was revoked")
    DESTINATION_NOT_ALLOWED = (
        "DESTINATION_NOT_ALLOWED",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the destination is not among the allowed ones",
    )
    POLICY_INVALID = (
        "POLICY_INVALID",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the policy of this host is invalid, so everything is refused",
    )
    POLICY_DENIED = (
        "POLICY_DENIED",
        MIDDLEWARE,
        StatusCode.PERMISSION_DENIED,
        "the policy of this host does not allow this operation",
    )
    # Too much to do.
    RATE_LIMITED = (
        "RATE_LIMITED",
        MIDDLEWARE,
        StatusCode.RESOURCE_EXHAUSTED,
        "this VM asks more often than it may",
        Healing.ROOM,
    )
    TOO_MANY_OPERATIONS = (
        "TOO_MANY_OPERATIONS",
        MIDDLEWARE,
        StatusCode.RESOURCE_EXHAUSTED,
        "this VM has too many operations in flight",
        Healing.ROOM,
    )
    TOO_MANY_STREAMS = (
        "TOO_MANY_STREAMS",
        GRID_AND_MIDDLEWARE,
        StatusCode.RESOURCE_EXHAUSTED,
        "there are too many streams open",
        Healing.ROOM,
    )
    TOO_MANY_CALLS = (
        "TOO_MANY_CALLS",
        GRID_AND_MIDDLEWARE,
        StatusCode.RESOURCE_EXHAUSTED,
        "there are too many calls in work",
        Healing.ROOM,
    )
    TOO_MANY_SESSIONS = (
        "TOO_MANY_SESSIONS",
        GRID,
        StatusCode.RESOURCE_EXHAUSTED,
        "this hypervisor has too many sessions",
        Healing.ROOM,
    )
    TOO_MANY_LOGINS = (
        "TOO_MANY_LOGINS",
        GRID,
        StatusCode.RESOURCE_EXHAUSTED,
        "this hypervisor logs in too often",
        Healing.ROOM,
    )
    SLOT_BUSY = (
        "SLOT_BUSY",
        GRID,
        StatusCode.RESOURCE_EXHAUSTED,
        "too many operations wait for the VM's card",
        Healing.ROOM,
    )
    AGENT_BUSY = (
        "AGENT_BUSY",
        AGENT,
        StatusCode.RESOURCE_EXHAUSTED,
        "too many operations wait in the agent",
        Healing.ROOM,
    )
    WATCHER_TOO_SLOW = (
        "WATCHER_TOO_SLOW",
        MIDDLEWARE,
        StatusCode.RESOURCE_EXHAUSTED,
        "the events were not read in time",
    )
    # The state of things.
    DOMAIN_NOT_RUNNING = (
        "DOMAIN_NOT_RUNNING",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "this domain does not run",
    )
    SESSION_ENDED = (
        "SESSION_ENDED",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "this VM has lost its session with the grid",
    )
    VM_UNKNOWN = ("VM_UNKNOWN", MIDDLEWARE, StatusCode.NOT_FOUND, "there is no such VM")
    VM_EXISTS = ("VM_EXISTS", MIDDLEWARE, StatusCode.ALREADY_EXISTS, "there is such a VM already")
    VM_STATE_WRONG = (
        "VM_STATE_WRONG",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "this VM is not in the right state",
    )
    BINDING_MISMATCH = (
        "BINDING_MISMATCH",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "this domain is not the one that was bound to the VM",
    )
    # What the programs lean on.
    HYPERVISOR_UNAVAILABLE = (
        "HYPERVISOR_UNAVAILABLE",
        MIDDLEWARE,
        StatusCode.UNAVAILABLE,
        "the hypervisor does not answer now",
        Healing.TIME,
    )
    LIBVIRT_REFUSED = ("LIBVIRT_REFUSED", MIDDLEWARE, StatusCode.FAILED_PRECONDITION, "the hypervisor refused")
    AUDIT_UNAVAILABLE = (
        "AUDIT_UNAVAILABLE",
        MIDDLEWARE,
        StatusCode.UNAVAILABLE,
        "the decision cannot be recorded, so nothing is done",
        Healing.TIME,
    )
    STATE_UNAVAILABLE = (
        "STATE_UNAVAILABLE",
        GRID_AND_MIDDLEWARE,
        StatusCode.UNAVAILABLE,
        "the state cannot be read or written now",
        Healing.TIME,
    )
    SHUTTING_DOWN = ("SHUTTING_DOWN", GRID, StatusCode.UNAVAILABLE, "the grid shuts down", Healing.TIME)
    OPENID_PROVIDER_UNAVAILABLE = (
        "OPENID_PROVIDER_UNAVAILABLE",
        GRID,
        StatusCode.UNAVAILABLE,
        "the grid's login does not answer now",
        Healing.TIME,
    )
    GRID_UNAVAILABLE = (
        "GRID_UNAVAILABLE",
        MIDDLEWARE,
        StatusCode.UNAVAILABLE,
        "the grid cannot be reached now",
        Healing.TIME,
    )
    GRID_UNTRUSTED = (
        "GRID_UNTRUSTED",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "this host does not trust who answers in place of the grid; tell the operator of this host",
    )
    GRID_PROTOCOL_VIOLATED = (
        "GRID_PROTOCOL_VIOLATED",
        MIDDLEWARE,
        StatusCode.INTERNAL,
        "the grid's answer is not usable; tell the operator of this host",
    )
    CONTAINER_REFUSED = (
        "CONTAINER_REFUSED",
        MIDDLEWARE,
        StatusCode.INVALID_ARGUMENT,
        "the container is refused",
    )
    HYPERVISOR_CARD_UNAVAILABLE = (
        "HYPERVISOR_CARD_UNAVAILABLE",
        MIDDLEWARE,
        StatusCode.UNAVAILABLE,
        "the hypervisor's card cannot be used now",
        Healing.TIME,
    )
    HYPERVISOR_CARD_REFUSED = (
        "HYPERVISOR_CARD_REFUSED",
        MIDDLEWARE,
        StatusCode.FAILED_PRECONDITION,
        "the hypervisor's card refuses its service; tell the operator of this host",
    )
    CARD_UNAVAILABLE = (
        "CARD_UNAVAILABLE",
        GRID,
        StatusCode.UNAVAILABLE,
        "the VM's card cannot be used now",
        Healing.TIME,
    )
    CARD_REFUSED = ("CARD_REFUSED", GRID, StatusCode.FAILED_PRECONDITION, "the VM's card refused the operation")
    CARD_NOT_IN_GRID = (
        "CARD_NOT_IN_GRID",
        GRID,
        StatusCode.FAILED_PRECONDITION,
        "the VM's card is not in the grid",
    )
    INTERNAL = ("INTERNAL", ALL, StatusCode.INTERNAL, "a fault of this service; its log says more")
    # In the VM.
    NO_AGENT = ("NO_AGENT", AGENT, StatusCode.UNAVAILABLE, "there is no agent")
    SOCKET_PERMISSION = (
        "SOCKET_PERMISSION",
        AGENT,
        StatusCode.PERMISSION_DENIED,
        "this user may not open the agent's socket",
    )
    JOIN_INVALID = ("JOIN_INVALID", AGENT, StatusCode.FAILED_PRECONDITION, "the join information is not usable")
    NOT_ENROLLED = ("NOT_ENROLLED", AGENT, StatusCode.UNAVAILABLE, "the agent has no certificate")
    ENROLMENT_REFUSED = (
        "ENROLMENT_REFUSED",
        AGENT,
        StatusCode.FAILED_PRECONDITION,
        "the middleware did not enrol the agent",
    )
    IDENTITY_INVALID = (
        "IDENTITY_INVALID",
        AGENT,
        StatusCode.FAILED_PRECONDITION,
        "it is not known who this VM is",
    )
    MIDDLEWARE_UNAVAILABLE = (
        "MIDDLEWARE_UNAVAILABLE",
        AGENT,
        StatusCode.UNAVAILABLE,
        "the Secure Middleware cannot be reached",
        Healing.TIME,
    )
    ANSWER_REFUSED = (
        "ANSWER_REFUSED",
        AGENT,
        StatusCode.DATA_LOSS,
        "the answer to this operation was refused",
    )

    @property
    def http_status(self) -> int | None:
        """The HTTP status at the grid's HTTPS doors; None for what never goes out there."""
        return HTTP_STATUSES[self.code] if Domain.GRID in self.domains else None

    @property
    def transient(self) -> bool:
        """Whether the same request, with the same id, may succeed after a while."""
        return self.healing in (Healing.TIME, Healing.ROOM)

    @property
    def overload(self) -> bool:
        """Whether nothing was done because there was too much to do."""
        return self.healing is Healing.ROOM

    @property
    def needs_login(self) -> bool:
        """Whether a new login heals it."""
        return self.healing is Healing.LOGIN


def find_reason(untrusted: str) -> Reason | None:
    """The reason of that name; None for one that this version does not know."""
    return Reason.__members__.get(untrusted)


def healing_of(name: str, code: StatusCode) -> Healing:
    """What heals a failure of another program; one whose reason is not known here is judged by its code."""
    reason = find_reason(name)
    if reason is not None:
        return reason.healing
    return {StatusCode.UNAVAILABLE: Healing.TIME, StatusCode.RESOURCE_EXHAUSTED: Healing.ROOM}.get(code, Healing.NONE)
