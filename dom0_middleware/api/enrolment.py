"""The enrolment door of one domain: TLS with our certificate only; the join secret says that the caller is that domain's agent.

Once the agent has shown its certificate the secret is forgotten, and this door is there for the agent's key alone: its certificate may
end while the domain is paused or this daemon away, and then TLS lets it in nowhere else. ``RenewEnded`` compares the hash of the key
before it computes anything with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dom0_middleware.api.guard import timeout_of
from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.call import current_call
from dom0_middleware.enrolment import JoinSecrets, key_hash
from dom0_middleware.errors import Reason, Refused, cause_of
from dom0_middleware.guest import RENEWALS_PER_SECOND, GuestDomain
from dom0_middleware.guest_authority import GuestAuthority
from dom0_middleware.identity import Identities
from dom0_middleware.key_checks import KeyChecks
from secfunet.errors import SecFuNetError
from secfunet.middleware.v1 import agent_pb2 as pb
from secfunet.middleware.v1 import agent_pb2_grpc
from secfunet.rpc.guard import Context
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
        key_checks: KeyChecks,
        on_secret_used: Callable[[GuestDomain], Awaitable[None]],
    ) -> None:
        self._guest = guest
        self._secrets = secrets
        self._authority = authority
        self._identities = identities
        self._audit = audit
        self._key_checks = key_checks
        self._on_secret_used = on_secret_used

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:  # noqa: N802 - gRPC's name
        with self._refusals_recorded(Action.ENROL):
            certificate = await self._certify(request)
        await self._on_secret_used(self._guest)
        identity = await identity_as_known(
            self._identities, self._guest, min(IDENTITY_TIMEOUT, timeout_of(context) / 2)
        )
        # The grid may have taken its time; a certificate of a domain that stopped meanwhile is none.
        self._guest.require_running()
        return pb.EnrolResponse(
            certificate=certificate, guest_authority=self._authority.certificate_der, identity=identity
        )

    async def RenewEnded(  # noqa: N802 - gRPC's name
        self, request: pb.RenewEndedRequest, context: Context
    ) -> pb.RenewEndedResponse:
        guest = self._guest
        with self._refusals_recorded(Action.RENEW):
            self._require_entitled()
            guest.require_renewable(request.public_key)
            require_renewal_rate(guest)
            key = await self._key_checks.key_of(guest, request.certificate_signing_request)
            # Again, after the wait; and now it is known which key the request is for.
            self._require_entitled()
            guest.require_renewable(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
            certificate, facts = self._authority.issue_agent(key, guest.uuid)
        self._record(Action.RENEW, "permitted", detail=f"certificate {facts.serial:x}, after the end of the last one")
        self._audit.flush()
        guest.make_current(facts, key_hash(key))
        return pb.RenewEndedResponse(certificate=certificate)

    async def _certify(self, request: pb.EnrolRequest) -> bytes:
        guest = self._guest
        self._require_entitled()
        secret_hash = self._secrets.compare(guest.uuid, request.join_secret)
        key = await self._key_checks.key_of(guest, request.certificate_signing_request)
        self._require_entitled()
        self._secrets.give_to(guest.uuid, secret_hash, key)
        certificate, facts = self._authority.issue_agent(key, guest.uuid)
        self._record(Action.ENROL, "permitted", detail=f"certificate {facts.serial:x}")
        # On record before it is given out; if that fails the agent asks again, with the same key.
        self._audit.flush()
        guest.make_first(facts, key_hash(key))
        return certificate

    def _require_entitled(self) -> None:
        self._guest.require_running()
        if self._guest.record.revoked:
            self._guest.require_authorised()

    @contextlib.contextmanager
    def _refusals_recorded(self, action: Action) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            note = self._guest.refusals.admit()
            if note is not None:
                detail = "; ".join(part for part in (cause_of(error), note) if part)
                self._record(action, "refused", reason=str(error.reason), detail=detail)
            raise

    def _record(self, action: Action, decision: Decision, *, reason: str = "", detail: str = "") -> None:
        self._audit.record(
            DomainRecord(
                action,
                decision,
                correlation=current_call.get().correlation,
                guest_correlation=current_call.get().guest_correlation,
                vm=self._guest.uuid,
                name=self._guest.record.name,
                reason=reason,
                detail=detail,
            )
        )


def require_renewal_rate(guest: GuestDomain) -> None:
    """Raises Refused (RATE_LIMITED)."""
    if guest.renewals.admit() is None:
        raise Refused(
            Reason.RATE_LIMITED, "this agent renews its certificate too often", retry_after=1 / RENEWALS_PER_SECOND
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
