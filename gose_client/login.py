"""One login: the service provider is asked for a session, sends us to the OpenID provider, and grants it when we come back.

    POST {service provider}/v1/sessions        303 to {OpenID provider}        over TLS-Tandem with the hypervisor's card
    GET  {OpenID provider}/…                   303 to {login page}, a cookie   over ordinary TLS
    GET  {login page}/login?sid=…              303 back, with the assertion    over TLS-Tandem, our card against a card of the grid
    GET  {service provider}/v1/openid/return…  200, the session                over TLS-Tandem again

A login that the provider still remembers (its cookie) leaves the login page out. No redirect leads anywhere but to these three.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin

import grpc
from cryptography import x509

from gose_client.cards import CarefulCards
from gose_client.cookies import CookieJar
from gose_client.errors import GridRefusedError, GridUntrustedError, ProtocolViolationError
from gose_client.http_connections import HttpAnswer, HttpConnections
from gose_client.settings import GoseClientSettings
from secfunet.identity import IdentityError, der_of, load_certificate, pem_of, thumbprint, verify_container_authority
from secfunet.openid.errors import OpenIdFormatError
from secfunet.openid.realm import WebUrl, parse_url
from secfunet.rpc.correlation import CORRELATION_KEY

MAX_REDIRECTS = 8
SESSIONS_PATH = "/v1/sessions"

_SECRET = re.compile(r"[A-Za-z0-9_-]{20,256}")
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_OPERATIONS = frozenset({"sign", "decrypt", "encrypt"})
_CODES = {code.name: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class Grant:
    """What a login was worth. ``expires_at`` in UTC seconds; ``container_authority`` the X.509 certificate, DER."""

    secret: str = field(repr=False)
    expires_at: float
    container_authority: bytes = field(repr=False)
    vmid: str
    hvid: str
    operations: frozenset[str]


class Logins:
    """Makes logins. Several may run at the same time; each has cookies of its own, and leaves them to those who come after."""

    def __init__(
        self,
        settings: GoseClientSettings,
        http: HttpConnections,
        cards: CarefulCards,
        authority: x509.Certificate,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._http = http
        self._cards = cards
        self._authority = authority
        self._clock = clock
        self._cookies = CookieJar(clock)
        self._provider_origins = {settings.openid_provider, settings.openid_login}

    def forget(self) -> None:
        """Forgets earlier logins at the OpenID provider, and the connections that carried them."""
        self._cookies = CookieJar(self._clock)
        self._http.drop_idle(self._settings.openid_login)

    async def attempt(self, vm_certificate: bytes, vm_auth_token: str, correlation: str) -> Grant:
        """One login, all of it. Raises a GoseClientError; GridRefusedError with the grid's reason where the grid said no."""
        hypervisor = await self._cards.certificate(timeout=self._settings.card_timeout)
        cookies = self._cookies.copy()
        url = parse_url(self._settings.service_provider + SESSIONS_PATH)
        form = {
            "vm_certificate": pem_of(vm_certificate).decode("ascii"),
            "hypervisor_certificate": pem_of(hypervisor).decode("ascii"),
            "vm_auth_token": vm_auth_token,
        }
        headers = {"accept": "application/json", CORRELATION_KEY: correlation}
        answer = await self._http.request(
            "POST", url, headers={**headers, "content-type": "application/json"}, body=json.dumps(form).encode()
        )
        for _ in range(MAX_REDIRECTS):
            if answer.status not in (302, 303):
                break
            url = self._next(url, answer)
            if url.origin in self._provider_origins:
                cookie = cookies.header(url.host, url.path)
                answer = await self._http.request(
                    "GET", url, headers={**headers, **({"cookie": cookie} if cookie else {})}
                )
                for untrusted in answer.all("set-cookie"):
                    cookies.take(url.host, untrusted)
            else:
                answer = await self._http.request("GET", url, headers=headers)
        else:
            raise ProtocolViolationError(f"the login leads from one place to the next, {MAX_REDIRECTS} times and more")
        if answer.status != 200:
            raise _refusal(answer)
        if url.origin != self._settings.service_provider:
            raise ProtocolViolationError("the login ended at the OpenID provider")
        grant = self._grant(answer, thumbprint(vm_certificate), thumbprint(hypervisor))
        self._cookies.update(cookies)
        return grant

    def _next(self, url: WebUrl, answer: HttpAnswer) -> WebUrl:
        try:
            target = parse_url(urljoin(str(url), answer.header("location")))
        except (OpenIdFormatError, ValueError):
            raise ProtocolViolationError("the login leads to something that is no URL") from None
        if target.origin not in {self._settings.service_provider, *self._provider_origins}:
            raise ProtocolViolationError(
                f"the login leads to {target.origin}, which is not configured: it is none of service_provider, "
                "openid_provider and openid_login in this host's settings for the grid"
            )
        return target

    def _grant(self, answer: HttpAnswer, vmid: str, hvid: str) -> Grant:
        """The session, checked: it is for this VM on this hypervisor, and its container authority is one of the grid's CA."""
        match _json_object(answer):
            case {
                "session": str(secret),
                "expires_at": int(expires_at),
                "container_authority": str(pem),
                "vmid": str(granted_vmid),
                "hvid": str(granted_hvid),
                "operations": list(operations),
            } if _SECRET.fullmatch(secret) and all(isinstance(name, str) for name in operations):
                pass
            case _:
                raise ProtocolViolationError("the grid's answer is no session")
        if (granted_vmid, granted_hvid) != (vmid, hvid):
            raise ProtocolViolationError("the grid granted a session for another VM or hypervisor")
        now = self._clock()
        try:
            certificate = load_certificate(pem.encode("utf-8", "replace"))
            verify_container_authority(certificate, self._authority, now=now)
        except IdentityError as error:
            raise GridUntrustedError(f"the grid's container authority is not one of its CA: {error}") from error
        return Grant(secret, float(expires_at), der_of(certificate), vmid, hvid, _OPERATIONS & frozenset(operations))


def _json_object(answer: HttpAnswer) -> dict[str, Any]:
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _refusal(answer: HttpAnswer) -> GridRefusedError | ProtocolViolationError:
    """What the grid says in its JSON {"code", "reason", "message"} and in Retry-After."""
    match _json_object(answer):
        case {"code": str(code), "reason": str(reason), "message": str(message)} if (
            code in _CODES and _REASON.fullmatch(reason)
        ):
            waits = re.fullmatch(r"[0-9]{1,5}", answer.header("retry-after"))
            retry_after = float(waits[0]) if waits is not None else None
            return GridRefusedError(reason, message[:512], code=_CODES[code], retry_after=retry_after)
    return ProtocolViolationError(f"the grid answered with status {answer.status}, and does not say why")
