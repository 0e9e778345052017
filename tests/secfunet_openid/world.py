"""A provider and a relying party in memory, with a clock that the test moves and bytes that repeat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from secfunet.openid.discovery import SERVICE_SIGNON, XRDS_CONTENT_TYPE, DiscoveredService, xrds_document
from secfunet.openid.effects import Exchange, FetchPolicy, HttpRequest, HttpResponse, Result, drive_blocking
from secfunet.openid.errors import HttpFailedError
from secfunet.openid.form import IDENTIFIER_SELECT, NAMESPACE, PREFIX, decode_form, decode_query, url_with_message
from secfunet.openid.provider import OpenIdProvider
from secfunet.openid.relying_party import RelyingParty
from secfunet.openid.store import MemoryStore

OP = "https://op.test"
ENDPOINT = f"{OP}/openid"
ALICE = f"{OP}/id/alice"
REALM = "https://sp.test/"
RETURN_TO = "https://sp.test/return?state=1"
NOW = 1_795_000_000.0


class Stream:
    """Bytes that look random and are the same in every run."""

    def __init__(self, seed: str = "") -> None:
        self._seed = seed
        self._count = 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed}/{self._count}".encode()).digest(size)


@dataclass
class World:
    """Both sides; ``pages`` are what the web answers beside the endpoint; ``requests`` what was asked of it."""

    over_tls: bool = True
    now: float = NOW
    store: MemoryStore = field(default_factory=MemoryStore)
    pages: dict[str, HttpResponse] = field(default_factory=dict)
    requests: list[HttpRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.provider = OpenIdProvider(ENDPOINT, self.store, lambda: self.now, Stream("op"))
        self.party = RelyingParty(
            REALM, "https://sp.test/return", self.store, FetchPolicy([OP]), lambda: self.now, Stream("rp")
        )
        self.pages[f"{OP}/"] = xrds(xrds_document(ENDPOINT))
        self.pages[ALICE] = xrds(xrds_document(ENDPOINT, service_type=SERVICE_SIGNON))
        self.service = DiscoveredService(ENDPOINT, IDENTIFIER_SELECT, IDENTIFIER_SELECT)

    def fetch(self, request: HttpRequest) -> HttpResponse:
        self.requests.append(request)
        if request.method == "POST" and request.url == ENDPOINT:
            answer = self.provider.direct(decode_form(request.body), self.over_tls)
            return HttpResponse(answer.status, {"Content-Type": answer.content_type}, answer.body)
        if request.url not in self.pages:
            raise HttpFailedError(f"nobody answers at {request.url}")
        return self.pages[request.url]

    def run(self, exchange: Exchange[Result]) -> Result:
        return drive_blocking(exchange, self.fetch)

    def assertion(self, *, associated: bool = True, return_to: str = RETURN_TO) -> str:
        """Where alice comes back to."""
        association = self.run(self.party.associate(self.service)) if associated else None
        url = self.party.authentication_request(self.service, association, return_to=return_to)
        return self.provider.positive_assertion(self.provider.parse_checkid(decode_query(url)), ALICE)

    def verify(self, url: str, *, return_to: str = RETURN_TO) -> str:
        return self.run(self.party.verify_response(url, return_to=return_to, expected=self.service))


def xrds(document: bytes) -> HttpResponse:
    return HttpResponse(200, {"Content-Type": XRDS_CONTENT_TYPE}, document)


def message_in(url: str) -> dict[str, str]:
    """The message of a URL, without prefixes."""
    return {key.removeprefix(PREFIX): value for key, value in decode_query(url).items() if key.startswith(PREFIX)}


def with_message(message: dict[str, str], url: str = RETURN_TO) -> str:
    return url_with_message(url, message)


def request(**fields: str) -> dict[str, str]:
    """The parameters of a request."""
    return {"openid.ns": NAMESPACE, **{f"openid.{key}": value for key, value in fields.items()}}
