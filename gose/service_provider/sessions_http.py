"""The service provider's HTTPS door: a session is asked for, its hypervisor is sent to log in, comes back, and is granted it.

What an answer at ``/v1/openid/return`` is worth depends on the connection: its client certificate must be the one that began.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from aiohttp import web
from cryptography import x509

from gose.errors import Reason, Refusal
from gose.http import CORRELATION, Door, json_object, see_other
from gose.places import Claim
from gose.registry import Registry
from gose.service_provider.openid_client import OpenIdHttp
from gose.sessions import SessionStore
from gose.settings import Limits
from gose.single_use import RateLimit, SingleUse
from gose.slots.rack import Rack
from gose.standing import RegistryStanding
from secfunet.identity import IdentityError, Role, der_of, load_certificate, pem_of, thumbprint, verify_certificate
from secfunet.openid.discovery import DiscoveredService
from secfunet.openid.effects import drive
from secfunet.openid.errors import AssociationRefusedError, NegativeAssertion, OpenIdError
from secfunet.openid.realm import same_url
from secfunet.openid.relying_party import RelyingParty
from secfunet.vm_auth_token import TokenError, TokenVerifier, VmAuthToken

log = logging.getLogger(__name__)

SESSIONS_PATH = "/v1/sessions"
RETURN_PATH = "/v1/openid/return"


@dataclass(frozen=True)
class PendingLogin:
    """Between the two halves of a login: what was asked for, by whom, and which provider was asked."""

    vmid: str
    hvid: str
    token: str = field(repr=False)
    service: DiscoveredService


class SessionDoor:
    """The handlers. ``origin`` is this door's; ``provider`` the OpenID provider's origin, where identifiers live."""

    def __init__(
        self,
        *,
        origin: str,
        provider: str,
        relying_party: RelyingParty,
        http: OpenIdHttp,
        authority: x509.Certificate,
        container_authority: x509.Certificate,
        verifier: TokenVerifier,
        registry: Registry,
        standing: RegistryStanding,
        sessions: SessionStore,
        rack: Rack,
        limits: Limits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._origin = origin
        self._provider = provider
        self._party = relying_party
        self._http = http
        self._authority = authority
        self._container_authority = pem_of(der_of(container_authority)).decode()
        self._verifier = verifier
        self._registry = registry
        self._standing = standing
        self._sessions = sessions
        self._rack = rack
        self._clock = clock
        self._pending: SingleUse[PendingLogin] = SingleUse(
            limit=limits.logins_pending,
            lifetime=limits.login_lifetime,
            per_owner=limits.logins_per_hypervisor,
        )
        self._rate = RateLimit(limit=limits.logins_per_minute, window=60.0)
        self.door: Door | None = None

    def routes(self) -> list[web.RouteDef]:
        """For Door."""
        return [web.post(SESSIONS_PATH, self.begin), web.get(RETURN_PATH, self.finish, allow_head=False)]

    async def begin(self, untrusted: web.Request) -> web.Response:
        """POST {"vm_certificate", "hypervisor_certificate", "vm_auth_token"}: 303 to the OpenID provider.

        Rules, in their order: the hypervisor's certificate is the connection's own, of this CA, and admitted; the hypervisor is within
        its rate; the VM's certificate is of this CA, and admitted; the token is for this VM on this hypervisor; the VM is not elsewhere.
        """
        if self.door is None:
            raise RuntimeError("there is no door")
        peer = _peer_certificate(untrusted)
        form = json_object(await self.door.body(untrusted))
        hypervisor, vm = _certificate(form, "hypervisor_certificate"), _certificate(form, "vm_certificate")
        token = form.get("vm_auth_token")
        if not isinstance(token, str):
            raise Refusal(Reason.REQUEST_INVALID, "vm_auth_token is missing")
        hvid = thumbprint(peer)
        if der_of(hypervisor) != peer:
            raise Refusal(
                Reason.HYPERVISOR_MISMATCH,
                "the connection was opened with another certificate",
                detail=f"{thumbprint(der_of(hypervisor))} presented over a connection of {hvid}",
            )
        self._verify(hypervisor, Role.HYPERVISOR)
        self._standing.hypervisor(hvid)
        self._rate.spend(hvid)
        self._verify(vm, Role.VM)
        vmid = thumbprint(der_of(vm))
        self._standing.vm(vmid)
        self._sessions.places.check(self._claim(self._verify_token(token, vmid, hvid)))
        service = await self._discover()
        association = None
        try:
            association = await drive(self._party.associate(service), self._http.fetch)
        except AssociationRefusedError as error:
            # Then the provider is asked about the assertion (check_authentication).
            log.info("no association with the OpenID provider", extra={"cause": str(error)})
        except OpenIdError as error:
            raise _provider_unavailable(error) from None
        state = self._pending.put(PendingLogin(vmid, hvid, token, service), owner=hvid)
        url = self._party.authentication_request(service, association, return_to=self._return_to(state))
        log.info(
            "login begun",
            extra={"vmid": vmid, "hvid": hvid, "correlation": untrusted[CORRELATION]},
        )
        return see_other(url)

    async def finish(self, untrusted: web.Request) -> web.Response:
        """GET with the assertion: 200 and the session.

        Rules, in their order: a login waits under that state; the connection is of the hypervisor that began it; (the state is used up;)
        the assertion holds; it names that hypervisor; nothing was revoked meanwhile; the VM's card is in this grid; the VM is not
        elsewhere.
        """
        hvid = thumbprint(_peer_certificate(untrusted))
        state = untrusted.query.get("state", "")
        pending = self._pending.look(state)
        if pending is None:
            raise Refusal(Reason.LOGIN_UNKNOWN, "this login has ended, or never began: begin again")
        if pending.hvid != hvid:
            # Left to whom it belongs: a state that leaked must not end his login.
            raise Refusal(
                Reason.HYPERVISOR_MISMATCH,
                "this login was begun by another hypervisor",
                detail=f"login of {pending.hvid} over a connection of {hvid}",
            )
        if self._pending.take(state) is None:
            raise Refusal(Reason.LOGIN_UNKNOWN, "this login has ended, or never began: begin again")
        try:
            claimed_id = await drive(
                self._party.verify_response(
                    f"{self._origin}{untrusted.raw_path}", return_to=self._return_to(state), expected=pending.service
                ),
                self._http.fetch,
            )
        except NegativeAssertion as error:
            raise Refusal(Reason.LOGIN_REFUSED, "the OpenID provider did not log you in", detail=str(error)) from None
        except OpenIdError as error:
            raise Refusal(Reason.LOGIN_REFUSED, "the login does not hold", detail=str(error)) from None
        if not same_url(claimed_id, f"{self._provider}/id/{hvid}"):
            raise Refusal(Reason.LOGIN_REFUSED, "another hypervisor has logged in", detail=f"{claimed_id} for {hvid}")
        token = self._verify_token(pending.token, pending.vmid, hvid)
        self._standing.check(vmid=pending.vmid, hvid=hvid, token_id=token.jti)
        seid = self._standing.vm(pending.vmid).seid
        if seid is None or self._rack.vm(seid) is None:
            raise Refusal(
                Reason.CARD_NOT_IN_GRID, "the VM's secure element is not in this grid", detail=f"{pending.vmid}: {seid}"
            )
        secret, session = self._sessions.grant(
            vmid=pending.vmid,
            hvid=hvid,
            seid=seid,
            token_id=token.jti,
            operations=token.operations,
            token_issued_at=self._claim(token).issued_at,
            token_expires_at=token.expires_at,
        )
        log.info(
            "session granted",
            extra={
                "session": session.name,
                "vmid": session.vmid,
                "hvid": hvid,
                "seid": seid,
                "expires_at": session.expires_at,
                "correlation": untrusted[CORRELATION],
            },
        )
        return web.json_response(
            {
                "session": secret,
                "expires_at": int(session.expires_at),
                "container_authority": self._container_authority,
                "vmid": session.vmid,
                "hvid": hvid,
                "operations": sorted(session.operations),
            }
        )

    def _return_to(self, state: str) -> str:
        return f"{self._origin}{RETURN_PATH}?state={quote(state)}"

    async def _discover(self) -> DiscoveredService:
        try:
            return await drive(self._party.discover(f"{self._provider}/"), self._http.fetch)
        except OpenIdError as error:
            raise _provider_unavailable(error) from None

    def _verify(self, certificate: x509.Certificate, role: Role) -> None:
        try:
            verify_certificate(certificate, self._authority, role=role, now=self._clock())
        except IdentityError as error:
            reason = Reason.HYPERVISOR_REFUSED if role is Role.HYPERVISOR else Reason.VM_REFUSED
            raise Refusal(reason, f"the certificate is not that of a {role} of this grid", detail=str(error)) from None

    def _claim(self, token: VmAuthToken) -> Claim:
        recorded = self._registry.token(token.jti)
        # A registry that was put back to an older copy does not know it: then it counts as issued in the first moment of its second.
        return Claim(token.vmid, token.hvid, recorded.issued_at if recorded is not None else token.issued_at)

    def _verify_token(self, untrusted: str, vmid: str, hvid: str) -> VmAuthToken:
        try:
            return self._verifier.verify(
                untrusted, vmid=vmid, hvid=hvid, now=self._clock(), is_revoked=self._registry.is_token_revoked
            )
        except TokenError as error:
            # Which rule it broke is for the log; outside, all refused tokens look alike.
            raise Refusal(Reason.TOKEN_REFUSED, "the VM-Auth-Token is refused", detail=error.refusal.name) from None


def _peer_certificate(request: web.Request) -> bytes:
    """The client certificate of the connection, DER. Raises Refusal CERTIFICATE_REQUIRED."""
    tls = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
    certificate = tls.getpeercert(binary_form=True) if isinstance(tls, ssl.SSLObject) else None
    if not certificate:
        raise Refusal(Reason.CERTIFICATE_REQUIRED, "the connection has no client certificate")
    return bytes(certificate)


def _certificate(form: dict[str, object], name: str) -> x509.Certificate:
    text = form.get(name)
    if not isinstance(text, str):
        raise Refusal(Reason.REQUEST_INVALID, f"{name} is missing")
    try:
        return load_certificate(text.encode("utf-8", "replace"))
    except IdentityError as error:
        raise Refusal(Reason.REQUEST_INVALID, f"{name}: {error}") from None


def _provider_unavailable(error: OpenIdError) -> Refusal:
    return Refusal(
        Reason.OPENID_PROVIDER_UNAVAILABLE, "the OpenID provider cannot be asked", retry_after=1.0, detail=str(error)
    )
