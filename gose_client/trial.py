"""Would a login work now? The hypervisor's card, the four places of the grid and the login itself are tried, without any VM.

What is found is said of each link: whether it works, whether waiting may heal it, or which setting is wrong. No operation is done, and
the login is one at the OpenID provider only: its assertion goes nowhere.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urljoin

from gose_client.cards import CarefulCards
from gose_client.connectors import Connectors, find_cause
from gose_client.cookies import CookieJar
from gose_client.errors import GoseClientError, GridUnavailableError, GridUntrustedError, HypervisorCardError
from gose_client.http_connections import Connect, HttpAnswer, HttpConnections
from gose_client.settings import GoseClientSettings
from secfunet.apdu import ApduError, PinError
from secfunet.card.errors import CardError, CardFormatError
from secfunet.errors import SecFuNetError
from secfunet.openid.discovery import parse_xrds
from secfunet.openid.errors import OpenIdError
from secfunet.openid.form import IDENTIFIER_SELECT, NAMESPACE, url_with_message
from secfunet.openid.realm import WebUrl, parse_url
from secfunet.service.credentials import NoCredentialsError
from secfunet.service.files import UnsafeFileError
from secfunet.tls.errors import ServerNameError

RETURN_PATH: Final = "/v1/openid/return"
_XRDS_TYPE: Final = "application/xrds+xml"
# What X509_verify_cert says of a certificate (openssl-verification-options(1)): not yet valid, expired; other host name, other address.
_TIME, _NAME = (9, 10), (62, 64)


class LinkState(StrEnum):
    """``AWAY`` may heal by itself; ``REFUSED`` does not, and no setting is known to be at fault; ``WRONG`` is that of the setting named."""

    OK = "ok"
    AWAY = "away"
    REFUSED = "refused"
    WRONG = "wrong"


@dataclass(frozen=True)
class Link:
    """One link of the chain. ``setting``: the key that is wrong, as in the settings file."""

    name: str
    state: LinkState
    message: str = ""
    setting: str = ""


class Trial:
    """Tries the links of one client. ``look`` may be called again and again, one call at a time."""

    def __init__(
        self, settings: GoseClientSettings, http: HttpConnections, cards: CarefulCards, connectors: Connectors
    ) -> None:
        self._settings = settings
        self._http = http
        self._cards = cards
        self._places: dict[str, Connect] = {
            "openid_provider": connectors.http()[settings.openid_provider],
            "service_provider": connectors.http()[settings.service_provider],
            "operations": connectors.operations,
            "openid_login": connectors.http()[settings.openid_login],
        }

    async def look(self, *, timeout: float) -> tuple[Link, ...]:
        """All links, in their order; those behind a broken one are left out. ``timeout``: seconds for each of the three steps."""
        (card,) = await self._all([self._card()], ["card"], timeout)
        # The OpenID endpoint is reached without the card.
        names = list(self._places) if card.state is LinkState.OK else ["openid_provider"]
        places = await self._all([self._place(name) for name in names], names, timeout)
        links = [card, *places]
        if all(link.state is LinkState.OK for link in links):
            links += await self._all([self._login()], ["login"], timeout)
        return tuple(links)

    async def _all(self, steps: list[Awaitable[Link]], names: list[str], timeout: float) -> list[Link]:
        async def one(step: Awaitable[Link], name: str) -> Link:
            try:
                async with asyncio.timeout(timeout):
                    return await step
            except TimeoutError:
                return Link(name, LinkState.AWAY, f"no answer within {timeout:g} s")

        return list(await asyncio.gather(*map(one, steps, names)))

    async def _card(self) -> Link:
        try:
            async with self._cards.lease(timeout=self._settings.card_timeout) as card:
                await card.certificate()
        except HypervisorCardError as error:
            return Link("card", LinkState.WRONG, str(error), "card")  # its PIN
        except (UnsafeFileError, NoCredentialsError, CardFormatError) as error:
            return Link("card", LinkState.WRONG, str(error), "card")
        except ApduError as error:
            return Link("card", LinkState.REFUSED, f"the card refuses, is it enrolled? {error}")
        except CardError as error:
            return Link("card", LinkState.AWAY, f"the card cannot be used now: {error}")
        except OSError as error:
            return _pin_file(error)
        return Link("card", LinkState.OK)

    async def _place(self, name: str) -> Link:
        try:
            _, writer = await self._places[name]()
        except (SecFuNetError, OSError) as error:
            return _judged(name, error)
        writer.transport.abort()
        return Link(name, LinkState.OK)

    async def _login(self) -> Link:
        try:
            return await self._logged_in()
        except (GoseClientError, OpenIdError, ValueError) as error:
            return _judged("login", error)

    async def _logged_in(self) -> Link:
        settings = self._settings
        found = await self._http.request("GET", parse_url(settings.openid_provider), headers={"accept": _XRDS_TYPE})
        services = parse_xrds(found.body) if found.status == 200 else ()
        if not services:
            return _elsewhere("openid_provider", f"{settings.openid_provider} is no OpenID provider")
        endpoint = parse_url(services[0].uri)
        if endpoint.origin != settings.openid_provider:
            return _elsewhere("openid_provider", f"the OpenID provider calls itself {endpoint.origin}")
        asked = {
            "ns": NAMESPACE,
            "mode": "checkid_setup",
            "claimed_id": IDENTIFIER_SELECT,
            "identity": IDENTIFIER_SELECT,
            "return_to": f"{settings.service_provider}{RETURN_PATH}?state=trial",
            "realm": f"{settings.service_provider}/",
        }
        url = parse_url(url_with_message(str(endpoint), asked))
        cookies = CookieJar()
        answer = await self._get(url, cookies)
        target = _target(url, answer)
        if target is None or target.origin == settings.service_provider:
            what = (
                f"the OpenID provider serves no '{settings.service_provider}': is it the service provider's own name?"
            )
            return _elsewhere("service_provider", what)
        if target.origin != settings.openid_login:
            return _elsewhere("openid_login", f"the login page is at {target.origin}")
        answer = await self._get(target, cookies)
        back = _target(target, answer)
        if back is None or back.origin != settings.service_provider or "openid.mode=id_res" not in back.query:
            return Link(
                "login", LinkState.REFUSED, f"the grid does not log this hypervisor in (status {answer.status})"
            )
        return Link("login", LinkState.OK)

    async def _get(self, url: WebUrl, cookies: CookieJar) -> HttpAnswer:
        cookie = cookies.header(url.host, url.path)
        answer = await self._http.request("GET", url, headers={"cookie": cookie} if cookie else {})
        for untrusted in answer.all("set-cookie"):
            cookies.take(url.host, untrusted)
        return answer


def _target(url: WebUrl, answer: HttpAnswer) -> WebUrl | None:
    if answer.status not in (302, 303):
        return None
    return parse_url(urljoin(str(url), answer.header("location")))


def _elsewhere(setting: str, message: str) -> Link:
    return Link("login", LinkState.WRONG, message, f"grid.{setting}")


def _pin_file(error: OSError) -> Link:
    where = f"{error.filename}: " if error.filename else ""
    return Link("card", LinkState.WRONG, f"{where}{error.strerror or error}", "card")


def _judged(name: str, error: BaseException) -> Link:
    certificate = find_cause(error, ssl.SSLCertVerificationError)
    if certificate is not None:
        if certificate.verify_code in _TIME:
            return Link(name, LinkState.REFUSED, f"its certificate is not valid now: {certificate.verify_message}")
        if certificate.verify_code in _NAME:
            return Link(name, LinkState.WRONG, f"it has another name: {certificate.verify_message}", f"grid.{name}")
        wrong = f"the certificate that answers was not issued by this CA: {certificate.verify_message}"
        return Link(name, LinkState.WRONG, wrong, "grid.authority")
    if find_cause(error, ServerNameError) is not None:
        return Link(name, LinkState.WRONG, str(error), f"grid.{name}")
    if find_cause(error, PinError) is not None:
        return Link(name, LinkState.WRONG, str(error), "card")
    if isinstance(error, GridUnavailableError | OSError):
        return Link(name, LinkState.AWAY, str(error))
    if isinstance(error, GridUntrustedError):
        return Link(name, LinkState.REFUSED, str(error))
    return Link(name, LinkState.REFUSED, str(error))
