"""The enrolment door of one domain: TLS with our certificate only; the join secret says that the caller is that domain's agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from dom0_middleware.api.guard import Context, timeout_of
from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.call import current_call
from dom0_middleware.enrolment import JoinSecrets
from dom0_middleware.errors import Refused
from dom0_middleware.guest import GuestDomain
from dom0_middleware.guest_authority import GuestAuthority, parse_request
from dom0_middleware.identity import Identities
from secfunet.errors import SecFuNetError
from secfunet.middleware.v1 import agent_pb2 as pb
from secfunet.middleware.v1 import agent_pb2_grpc
from secfunet.service.audit import AuditLog, Decision

# How long enrolment waits for the grid, which the certificate itself does not need.
IDENTITY_TIMEOUT = 5.0  # seconds


class EnrolmentService(agent_pb2_grpc.EnrolmentServiceServicer):
    """Of ``guest`` only: no field of a request says who calls."""

    def __init__(
        self,
        guest: GuestDomain,
        *,
        secrets: JoinSecrets,
        authority: GuestAuthority,
        identities: Identities,
        audit: AuditLog,
        on_secret_used: Callable[[GuestDomain], Awaitable[None]],
    ) -> None:
        self._guest = guest
        self._secrets = secrets
        self._authority = authority
        self._identities = identities
        self._audit = audit
        self._on_secret_used = on_secret_used

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:  # noqa: N802 - gRPC's name
        try:
            certificate = self._certify(request)
        except Refused as error:
            note = self._guest.refusals.admit()
            if note is not None:
                detail = "; ".join(part for part in (error.detail, note) if part)
                self._record("refused", reason=str(error.reason), detail=detail)
            raise
        await self._on_secret_used(self._guest)
        identity = await identity_as_known(
            self._identities, self._guest, min(IDENTITY_TIMEOUT, timeout_of(context) / 2)
        )
        # The grid may have taken its time; a certificate of a domain that stopped meanwhile is none.
        self._guest.require_running()
        return pb.EnrolResponse(
            certificate=certificate, guest_authority=self._authority.certificate_der, identity=identity
        )

    def _certify(self, request: pb.EnrolRequest) -> bytes:
        guest = self._guest
        guest.require_running()
        if guest.record.revoked:
            guest.require_authorised()
        key = parse_request(request.certificate_signing_request)
        self._secrets.redeem(guest.uuid, request.join_secret, key)
        certificate, facts = self._authority.issue_agent(key, guest.uuid)
        self._record("permitted", detail=f"certificate {facts.serial:x}")
        # On record before it is given out; if that fails the agent asks again, with the same key.
        self._audit.flush()
        guest.make_first(facts)
        return certificate

    def _record(self, decision: Decision, *, reason: str = "", detail: str = "") -> None:
        self._audit.record(
            DomainRecord(
                Action.ENROL,
                decision,
                correlation=current_call.get().correlation,
                vm=self._guest.uuid,
                name=self._guest.record.name,
                reason=reason,
                detail=detail,
            )
        )


async def identity_as_known(identities: Identities, guest: GuestDomain, timeout: float) -> pb.Identity:
    """The whole identity if the grid answers in time, else what is known without it."""
    try:
        identity = await identities.identity(guest, timeout=timeout, correlation=current_call.get().correlation)
    except SecFuNetError as error:
        identities.note(guest, str(error))
        return identities.known(guest)
    identities.note(guest, "")
    return identity
