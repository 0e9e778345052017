"""The login door: whoever gets here has opened TLS with a card, against a card of the grid. The client certificate says who that is.

The provider learns the hypervisor's name and the relying party's, and nothing of any VM. A resumed handshake is a login too: the secret
that it proves never leaves the card, and the cards bound how long a session can be resumed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from aiohttp import web
from cryptography import x509

from gose.errors import Reason, Refusal
from gose.http import CORRELATION, see_other
from gose.metrics import Metrics
from gose.openid_provider.endpoint import SIGN_ON_COOKIE, Endpoint, checked_sid, set_cookie
from gose.openid_provider.sign_on import SignOns
from gose.single_use import SingleUse
from gose.standing import RegistryStanding
from secfunet.identity import IdentityError, Role, load_certificate, thumbprint, verify_certificate
from secfunet.openid.errors import CheckidError
from secfunet.openid.provider import CheckidRequest, OpenIdProvider

log = logging.getLogger(__name__)


class Login:
    """The handler of ``/login``."""

    def __init__(
        self,
        provider: OpenIdProvider,
        endpoint: Endpoint,
        *,
        authority: x509.Certificate,
        pending: SingleUse[CheckidRequest],
        sign_ons: SignOns,
        standing: RegistryStanding,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._provider = provider
        self._endpoint = endpoint
        self._authority = authority
        self._pending = pending
        self._sign_ons = sign_ons
        self._standing = standing
        self._metrics = metrics
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        """For Door."""
        return [web.get("/login", self.login, allow_head=False)]

    async def login(self, untrusted: web.Request) -> web.Response:
        """A hypervisor of this grid's CA, not revoked; the cookie of the page that led here; a login that waits, taken once."""
        try:
            hvid, name = self._hypervisor(untrusted)
            sid = checked_sid(untrusted)
            checkid = self._pending.take(sid)
            if checkid is None:
                raise Refusal(Reason.LOGIN_UNKNOWN, "this login has ended, or never began")
            try:
                url = self._provider.positive_assertion(checkid, self._endpoint.claimed_id(hvid))
            except CheckidError as error:
                if error.redirect is None:
                    raise Refusal(Reason.LOGIN_REFUSED, str(error)) from None
                self._metrics.logins.labels("cancelled").inc()
                return see_other(error.redirect)
        except Refusal as refusal:
            self._metrics.logins.labels(refusal.reason.value).inc()
            raise
        transport = untrusted.transport
        log.info(
            "hypervisor logged in",
            extra={
                "hypervisor": name,
                "hvid": hvid,
                "realm": checkid.realm,
                "resumed": bool(transport.get_extra_info("resumed")) if transport is not None else None,
                "correlation": untrusted[CORRELATION],
            },
        )
        self._metrics.logins.labels("OK").inc()
        response = see_other(url)
        set_cookie(response, SIGN_ON_COOKIE, self._sign_ons.remember(hvid), self._sign_ons.lifetime)
        return response

    def _hypervisor(self, request: web.Request) -> tuple[str, str]:
        certificate = request.transport.get_extra_info("peercert") if request.transport is not None else None
        if not isinstance(certificate, bytes):
            raise Refusal(Reason.CERTIFICATE_REQUIRED, "the connection has no client certificate")
        try:
            # The server card has checked the chain; who it names, and whether it still may, is checked here.
            holder = verify_certificate(
                load_certificate(certificate), self._authority, role=Role.HYPERVISOR, now=self._clock()
            )
        except IdentityError as error:
            raise Refusal(
                Reason.LOGIN_REFUSED, "this certificate is not that of a hypervisor of this grid", detail=str(error)
            ) from None
        hvid = thumbprint(certificate)
        self._standing.hypervisor(hvid)
        return hvid, holder.name
