"""The OpenID provider's ordinary HTTPS door: discovery, associations, authentication requests, check_authentication."""

from __future__ import annotations

from urllib.parse import quote

from aiohttp import hdrs, web

from gose.errors import Reason, Refusal
from gose.http import Door, see_other
from gose.openid_provider.pages import identity_page, login_page, problem_page
from gose.openid_provider.sign_on import SignOns
from gose.single_use import RateLimit, SingleUse
from gose.standing import RegistryStanding
from secfunet.identity import IdentityError, check_thumbprint
from secfunet.openid.association import SessionType
from secfunet.openid.discovery import SERVICE_SERVER, SERVICE_SIGNON, XRDS_CONTENT_TYPE, XRDS_LOCATION, xrds_document
from secfunet.openid.errors import CheckidError, OpenIdFormatError
from secfunet.openid.form import FORM_CONTENT_TYPE, decode_form
from secfunet.openid.provider import CheckidRequest, OpenIdProvider
from secfunet.openid.realm import same_url
from secfunet.service.addresses import rate_key

SID_COOKIE = "sid"
SIGN_ON_COOKIE = "sso"
ENDPOINT_PATH = "/openid"
ALL_WINDOW = 10.0  # seconds
ALL_ASSOCIATIONS = 200  # of all addresses together
ALL_EXPONENTIATIONS = 20  # of them with Diffie-Hellman, some 10 ms of the grid's loop each: 2 % of it


class Endpoint:
    """The handlers. ``origin`` is this door's, ``login_origin`` that of the login page over TLS-Tandem."""

    def __init__(
        self,
        provider: OpenIdProvider,
        *,
        origin: str,
        login_origin: str,
        pending: SingleUse[CheckidRequest],
        sign_ons: SignOns,
        standing: RegistryStanding,
        login_lifetime: float,
        association_rate: RateLimit,
    ) -> None:
        self._provider = provider
        self._origin = origin
        self._login_origin = login_origin
        self._pending = pending
        self._sign_ons = sign_ons
        self._standing = standing
        self._login_lifetime = login_lifetime
        self._association_rate = association_rate
        self._all_associations = RateLimit(limit=ALL_ASSOCIATIONS, window=ALL_WINDOW, what="associations")
        self._all_exponentiations = RateLimit(limit=ALL_EXPONENTIATIONS, window=ALL_WINDOW, what="associations")
        self.door: Door | None = None

    def routes(self) -> list[web.RouteDef]:
        """For Door."""
        return [
            web.get("/", self.provider_identifier),
            web.get("/xrds", self.provider_xrds),
            web.get("/id/{thumbprint}", self.claimed_identifier),
            web.get("/id/{thumbprint}/xrds", self.claimed_xrds),
            web.get(ENDPOINT_PATH, self.indirect, allow_head=False),
            web.post(ENDPOINT_PATH, self.post),
            web.get("/cancel", self.cancel, allow_head=False),
        ]

    # --- discovery: by the document itself, by a header, by HTML

    async def provider_identifier(self, request: web.Request) -> web.Response:
        """The OP identifier: whoever starts here lets the provider say who the user is."""
        if _wants(request, XRDS_CONTENT_TYPE):
            return await self.provider_xrds(request)
        page = identity_page(
            title="OpenID provider of a grid of secure elements",
            text="Hypervisors log in here with their secure elements.",
            xrds_url=f"{self._origin}/xrds",
            endpoint_url=self._provider.endpoint_url,
        )
        return _html(page, headers={XRDS_LOCATION: f"{self._origin}/xrds"})

    async def provider_xrds(self, request: web.Request) -> web.Response:
        """The XRDS document of the OP identifier."""
        return _xrds(xrds_document(self._provider.endpoint_url, service_type=SERVICE_SERVER))

    async def claimed_identifier(self, request: web.Request) -> web.Response:
        """The claimed identifier of one enrolled hypervisor."""
        if _wants(request, XRDS_CONTENT_TYPE):
            return await self.claimed_xrds(request)
        hvid = self._known(request)
        page = identity_page(
            title="A hypervisor",
            text=f"Thumbprint (x5t#S256): {hvid}",
            xrds_url=f"{self.claimed_id(hvid)}/xrds",
            endpoint_url=self._provider.endpoint_url,
            local_id=self.claimed_id(hvid),
        )
        return _html(page, headers={XRDS_LOCATION: f"{self.claimed_id(hvid)}/xrds"})

    async def claimed_xrds(self, request: web.Request) -> web.Response:
        """Its XRDS document."""
        hvid = self._known(request)
        return _xrds(
            xrds_document(self._provider.endpoint_url, service_type=SERVICE_SIGNON, local_id=self.claimed_id(hvid))
        )

    def claimed_id(self, hvid: str) -> str:
        """The claimed identifier of a hypervisor."""
        return f"{self._origin}/id/{hvid}"

    def _known(self, request: web.Request) -> str:
        try:
            hvid = check_thumbprint(request.match_info["thumbprint"])
            self._standing.hypervisor(hvid)
        except (IdentityError, Refusal):
            raise Refusal(Reason.NOT_FOUND, "there is no such hypervisor") from None
        return hvid

    # --- messages

    async def post(self, untrusted: web.Request) -> web.Response:
        """A direct request of a relying party, or an authentication request that a browser posts."""
        if untrusted.content_type != FORM_CONTENT_TYPE.partition(";")[0]:
            raise Refusal(Reason.REQUEST_INVALID, f"a message is posted as {FORM_CONTENT_TYPE}")
        if self.door is None:
            raise RuntimeError("the endpoint has no door")
        params = _decode(await self.door.body(untrusted))
        if params.get("openid.mode", "").startswith("checkid_"):
            return self._checkid(untrusted, params)
        if params.get("openid.mode") == "associate":
            # Nobody has said who he is, and addresses are cheap: a rate for each, and one for all together. A relying party without an
            # association asks about each assertion.
            self._association_rate.spend(rate_key(untrusted.remote or ""))
            self._all_associations.spend("")
            if params.get("openid.session_type") != SessionType.NO_ENCRYPTION.value:
                self._all_exponentiations.spend("")
        answer = self._provider.direct(params, over_tls=True)
        return web.Response(status=answer.status, body=answer.body, headers={hdrs.CONTENT_TYPE: answer.content_type})

    async def indirect(self, untrusted: web.Request) -> web.Response:
        """An authentication request that a browser brings (a direct one is posted)."""
        return self._checkid(untrusted, _decode(untrusted.rel_url.raw_query_string))

    def _checkid(self, request: web.Request, params: dict[str, str]) -> web.Response:
        try:
            checkid = self._provider.parse_checkid(params)
            hvid = self._signed_on(request)
            if hvid is not None and self._may_assert(checkid, hvid):
                return see_other(self._provider.positive_assertion(checkid, self.claimed_id(hvid)))
        except CheckidError as error:
            if error.redirect is not None:
                return see_other(error.redirect)
            if _wants(request, "text/html"):
                return _html(problem_page(str(error)), status=400)
            raise Refusal(Reason.REQUEST_INVALID, str(error)) from None
        if checkid.immediate:
            return see_other(self._provider.setup_needed(checkid))
        sid = self._pending.put(checkid)
        login_url = f"{self._login_origin}/login?sid={quote(sid)}"
        if _wants(request, "text/html"):
            cancel_url = f"{self._origin}/cancel?sid={quote(sid)}"
            response = _html(login_page(realm=checkid.realm, login_url=login_url, cancel_url=cancel_url))
        else:
            response = see_other(login_url)
        # Whoever follows the link must be whoever was given it: nobody is logged in by a link that another one sent him.
        set_cookie(response, SID_COOKIE, sid, self._login_lifetime)
        return response

    async def cancel(self, untrusted: web.Request) -> web.Response:
        """The user does not want to."""
        checkid = self._pending.take(checked_sid(untrusted))
        if checkid is None:
            raise Refusal(Reason.LOGIN_UNKNOWN, "this login has ended, or never began")
        return see_other(self._provider.cancel(checkid))

    def _signed_on(self, request: web.Request) -> str | None:
        """The hypervisor whose login still counts, and who is still admitted."""
        cookie = request.cookies.get(SIGN_ON_COOKIE)
        hvid = self._sign_ons.hypervisor(cookie) if cookie else None
        if hvid is None:
            return None
        try:
            self._standing.hypervisor(hvid)
        except Refusal:
            return None
        return hvid

    def _may_assert(self, checkid: CheckidRequest, hvid: str) -> bool:
        return checkid.provider_chooses or same_url(checkid.claimed_id, self.claimed_id(hvid))


def checked_sid(untrusted: web.Request) -> str:
    """The sid of the query, which must be that of the cookie. Raises Refusal LOGIN_UNKNOWN."""
    sid = untrusted.query.get("sid", "")
    if not sid or untrusted.cookies.get(SID_COOKIE, "") != sid:
        raise Refusal(Reason.LOGIN_UNKNOWN, "this login began elsewhere: its cookie is missing")
    return sid


def set_cookie(response: web.Response, name: str, value: str, lifetime: float) -> None:
    """Over TLS only, out of reach of scripts, and not sent along by foreign pages' forms."""
    response.set_cookie(name, value, max_age=int(lifetime), path="/", secure=True, httponly=True, samesite="Lax")


def _decode(untrusted: bytes | str) -> dict[str, str]:
    try:
        return decode_form(untrusted)
    except OpenIdFormatError as error:
        raise Refusal(Reason.REQUEST_INVALID, str(error)) from None


def _wants(request: web.Request, media_type: str) -> bool:
    """Whether the Accept header names the type; a wildcard names nothing."""
    return media_type in (
        part.partition(";")[0].strip().lower() for part in request.headers.get(hdrs.ACCEPT, "").split(",")
    )


def _html(page: str, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=page, content_type="text/html", charset="utf-8", headers=headers)


def _xrds(document: bytes) -> web.Response:
    return web.Response(body=document, content_type=XRDS_CONTENT_TYPE)
