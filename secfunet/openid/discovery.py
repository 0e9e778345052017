"""Discovery (§7.3): from an identifier to the provider that speaks for it, by Yadis (XRDS) or HTML, and the documents that say so.

Both readers take hostile documents: they are bounded, and XML with a document type (so with entities) is refused before it is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser
from urllib.parse import urljoin
from xml.etree import ElementTree
from xml.sax.saxutils import escape as xml_escape

from secfunet.openid.effects import MAX_BODY, Exchange, FetchPolicy, HttpRequest, HttpResponse
from secfunet.openid.errors import DiscoveryError, OpenIdFormatError
from secfunet.openid.form import IDENTIFIER_SELECT
from secfunet.openid.realm import parse_url

XRDS_CONTENT_TYPE = "application/xrds+xml"
XRDS_LOCATION = "X-XRDS-Location"
SERVICE_SERVER = "http://specs.openid.net/auth/2.0/server"  # an OP identifier: the provider says who the user is
SERVICE_SIGNON = "http://specs.openid.net/auth/2.0/signon"  # a claimed identifier
SERVICE_RETURN_TO = "http://specs.openid.net/auth/2.0/return_to"  # a relying party's own (§13)

MAX_HTML = 32768
MAX_SERVICES = 64
MAX_REDIRECTS = 5
_XRD = "{xri://$xrd*($v*2.0)}"
_XRDS = "{xri://$xrds}"
_DECLARATION = re.compile(r"<!(?!--|\[CDATA\[)")
_LOWEST_PRIORITY = 1 << 31


@dataclass(frozen=True)
class DiscoveredService:
    """What discovery gives (§7.3.1). ``claimed_id`` and ``local_id`` are identifier_select where the provider chooses."""

    endpoint: str
    claimed_id: str
    local_id: str

    @property
    def provider_chooses(self) -> bool:
        return self.claimed_id == IDENTIFIER_SELECT


@dataclass(frozen=True)
class XrdService:
    """One <Service> with a usable URI, in the order of preference."""

    types: tuple[str, ...]
    uri: str
    local_id: str


def xrds_document(
    endpoint_url: str, *, service_type: str = SERVICE_SERVER, local_id: str = "", priority: int = 0
) -> bytes:
    """The XRDS document (§7.3.2) of an OP identifier, or of a claimed identifier (SERVICE_SIGNON)."""
    local = f"\n      <LocalID>{xml_escape(local_id)}</LocalID>" if local_id else ""
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<xrds:XRDS xmlns:xrds="xri://$xrds" xmlns="xri://$xrd*($v*2.0)">
  <XRD>
    <Service priority="{priority}">
      <Type>{xml_escape(service_type)}</Type>
      <URI>{xml_escape(endpoint_url)}</URI>{local}
    </Service>
  </XRD>
</xrds:XRDS>
""".encode()


def html_document(*, xrds_location: str = "", endpoint_url: str = "", local_id: str = "") -> bytes:
    """A page that leads to the provider: by meta http-equiv (Yadis), by <link rel> (§7.3.3), or by both."""
    head = '<meta charset="utf-8"><title>OpenID</title>'
    if xrds_location:
        head += f'<meta http-equiv="{XRDS_LOCATION}" content="{escape(xrds_location)}">'
    if endpoint_url:
        head += f'<link rel="openid2.provider" href="{escape(endpoint_url)}">'
    if local_id:
        head += f'<link rel="openid2.local_id" href="{escape(local_id)}">'
    return f"<!DOCTYPE html><html><head>{head}</head><body></body></html>\n".encode()


def parse_xrds(untrusted: bytes) -> tuple[XrdService, ...]:
    """The services of the last XRD of a document (Yadis 7.2), most preferred first. Raises OpenIdFormatError."""
    if len(untrusted) > MAX_BODY:
        raise OpenIdFormatError(f"an XRDS document is longer than {MAX_BODY} bytes")
    try:
        # Another encoding could hide a declaration from the check below, so there is one encoding.
        text = untrusted.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OpenIdFormatError("an XRDS document is not UTF-8") from None
    if _DECLARATION.search(text):
        raise OpenIdFormatError("an XRDS document has a document type or an entity")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  # bounded, and without declarations: nothing to expand or to fetch
    except (ElementTree.ParseError, ValueError, LookupError):
        raise OpenIdFormatError("an XRDS document is no well-formed XML") from None
    if root.tag != f"{_XRDS}XRDS":
        raise OpenIdFormatError("this is no XRDS document")
    descriptors = root.findall(f"{_XRD}XRD")
    if not descriptors:
        raise OpenIdFormatError("an XRDS document has no XRD")
    elements = descriptors[-1].findall(f"{_XRD}Service")
    if len(elements) > MAX_SERVICES:
        raise OpenIdFormatError(f"an XRD has more than {MAX_SERVICES} services")
    services = [
        XrdService(
            tuple(_text(kind) for kind in element.findall(f"{_XRD}Type")),
            _text(uris[0]),
            next((_text(local) for local in element.findall(f"{_XRD}LocalID")), ""),
        )
        for element in sorted(elements, key=_priority)
        if (uris := sorted(element.findall(f"{_XRD}URI"), key=_priority))
    ]
    return tuple(services)


def _text(element: ElementTree.Element) -> str:
    return (element.text or "").strip()


def _priority(element: ElementTree.Element) -> int:
    value = element.get("priority", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else _LOWEST_PRIORITY


class _HeadReader(HTMLParser):
    """Collects what discovery wants from a page's head, and nothing that a visitor may have put into its body."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.xrds_location = ""
        self.links: dict[str, str] = {}
        self.done = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.done = True
        if self.done:
            return
        values = {
            name: value or "" for name, value in reversed(attrs)
        }  # of an attribute that repeats, the first counts
        if tag == "meta" and values.get("http-equiv", "").lower() == XRDS_LOCATION.lower():
            self.xrds_location = self.xrds_location or values.get("content", "").strip()
        if tag == "link":
            for relation in values.get("rel", "").lower().split():
                self.links.setdefault(relation, values.get("href", "").strip())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "head":
            self.done = True


@dataclass(frozen=True)
class HtmlLinks:
    """What the head of a page says; "" where it says nothing."""

    xrds_location: str
    provider: str
    local_id: str


def parse_html(untrusted: bytes) -> HtmlLinks:
    """Total: any page gives links, or none. Only the first 32 KiB and only the head are read."""
    reader = _HeadReader()
    text = untrusted[:MAX_HTML].decode("utf-8", "replace")
    try:
        reader.feed(text)
    except AssertionError:
        # html.parser's own "unreachable" places, reached by broken marked sections.
        return HtmlLinks("", "", "")
    return HtmlLinks(
        reader.xrds_location, reader.links.get("openid2.provider", ""), reader.links.get("openid2.local_id", "")
    )


def discover(identifier: str, policy: FetchPolicy) -> Exchange[DiscoveredService]:
    """Finds the provider of an identifier. Raises DiscoveryError, FetchRefusedError or HttpFailedError.

    Redirects are followed up to five, each checked against the policy; the claimed identifier is the URL where they end (§7.3.1).
    """
    url, response = yield from _fetch(identifier, policy, f"{XRDS_CONTENT_TYPE}, text/html;q=0.5")
    claimed_id = str(parse_url(url))
    if response.media_type == XRDS_CONTENT_TYPE:
        return _choose(claimed_id, _services(response.body), policy)
    location = response.header(XRDS_LOCATION)
    links = HtmlLinks("", "", "")
    if not location and response.media_type in ("text/html", "application/xhtml+xml"):
        links = parse_html(response.body)
        location = links.xrds_location
    if location:
        _, document = yield from _fetch(_join(url, location), policy, XRDS_CONTENT_TYPE)
        services = _services(document.body)
        if any({SERVICE_SERVER, SERVICE_SIGNON} & set(service.types) for service in services):
            return _choose(claimed_id, services, policy)
        # An XRDS document without OpenID does not end the search: HTML is tried next (§7.3).
        links = parse_html(response.body)
    if not links.provider:
        raise DiscoveryError(f"no OpenID 2.0 provider is named at {url!r:.200}")
    endpoint = _join(url, links.provider)
    policy.check(endpoint)
    return DiscoveredService(endpoint, claimed_id, links.local_id or claimed_id)


def _choose(claimed_id: str, services: Collection[XrdService], policy: FetchPolicy) -> DiscoveredService:
    """An OP identifier element comes before a claimed identifier element (§7.3.2.2)."""
    for service in services:
        if SERVICE_SERVER in service.types:
            policy.check(service.uri)
            return DiscoveredService(service.uri, IDENTIFIER_SELECT, IDENTIFIER_SELECT)
    for service in services:
        if SERVICE_SIGNON in service.types:
            policy.check(service.uri)
            return DiscoveredService(service.uri, claimed_id, service.local_id or claimed_id)
    raise DiscoveryError(f"no OpenID 2.0 provider is named for {claimed_id!r:.200}")


def _services(untrusted: bytes) -> tuple[XrdService, ...]:
    try:
        return parse_xrds(untrusted)
    except OpenIdFormatError as error:
        raise DiscoveryError(str(error)) from None


def _join(base: str, untrusted: str) -> str:
    try:
        return urljoin(base, untrusted)
    except ValueError:
        raise DiscoveryError("a document names no URL") from None


def _fetch(untrusted_url: str, policy: FetchPolicy, accept: str) -> Exchange[tuple[str, HttpResponse]]:
    url = str(policy.check(untrusted_url)).partition("#")[0]
    for _ in range(MAX_REDIRECTS + 1):
        response = yield HttpRequest("GET", url, {"Accept": accept})
        if len(response.body) > MAX_BODY:
            raise DiscoveryError("a document is too long")
        if response.status == 200:
            return url, response
        location = response.header("location")
        if response.status not in (301, 302, 303, 307, 308) or not location:
            raise DiscoveryError(f"{url!r:.200} answered with status {response.status}")
        url = str(policy.check(_join(url, location))).partition("#")[0]
    raise DiscoveryError(f"more than {MAX_REDIRECTS} redirects")
