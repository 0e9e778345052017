"""Discovery: the four ways, hostile documents, and places that are not asked."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from secfunet.openid.discovery import (
    MAX_REDIRECTS,
    SERVICE_SERVER,
    SERVICE_SIGNON,
    XRDS_LOCATION,
    html_document,
    parse_html,
    parse_xrds,
    xrds_document,
)
from secfunet.openid.effects import MAX_BODY, FetchPolicy, HttpResponse
from secfunet.openid.errors import DiscoveryError, FetchRefusedError, OpenIdError, OpenIdFormatError
from secfunet.openid.form import IDENTIFIER_SELECT
from tests.secfunet_openid.world import ALICE, ENDPOINT, OP, World, xrds

HTML = {"Content-Type": "text/html; charset=utf-8"}
SIGNON = xrds(xrds_document(ENDPOINT, service_type=SERVICE_SIGNON))
printable = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF), min_size=1, max_size=30)


@given(printable, printable)
def test_our_document_is_read_back_by_our_reader(endpoint: str, local_id: str) -> None:
    (service,) = parse_xrds(xrds_document(endpoint, service_type=SERVICE_SIGNON, local_id=local_id))
    assert (service.types, service.uri, service.local_id) == ((SERVICE_SIGNON,), endpoint.strip(), local_id.strip())


@given(printable, printable)
def test_our_page_is_read_back_by_our_reader(location: str, endpoint: str) -> None:
    links = parse_html(html_document(xrds_location=location, endpoint_url=endpoint, local_id=endpoint))
    assert (links.xrds_location, links.provider) == (location.strip(), endpoint.strip())


@given(st.binary(max_size=400))
@example(b"<![")
@example(b"<![CDATA[x")
@example(b"<!x[")
@example(b"<!DOCTYPE html")
def test_any_bytes_are_a_document_or_the_error(untrusted: bytes) -> None:
    parse_html(untrusted)
    with contextlib.suppress(OpenIdFormatError):
        parse_xrds(untrusted)


@pytest.mark.parametrize("piece", [b"<a ", b"<!--", b"<![", b"</", b"<script>", b'<a b="', b"&", b"<?", b"<a b='x' "])
def test_a_long_hostile_page_does_not_take_long(piece: bytes) -> None:
    begun = time.process_time()
    parse_html(piece * (65536 // len(piece)))
    assert time.process_time() - begun < 2.0


BOMB = b"""<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><x>&b;</x>"""


@pytest.mark.parametrize(
    "untrusted",
    [
        BOMB,
        b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>',
        BOMB.decode().encode("utf-16"),
        BOMB.decode().encode("utf-7") + b"\xff",
        b"<x/>",
        b"",
        b'<xrds:XRDS xmlns:xrds="xri://$xrds"/>',
        b"<a>" * 5000,
        b" " * (MAX_BODY + 1),
        xrds_document(ENDPOINT).replace(b"</XRD>", b"<Service/>" * 65 + b"</XRD>"),
    ],
)
def test_documents_that_are_refused(untrusted: bytes) -> None:
    with pytest.raises(OpenIdFormatError):
        parse_xrds(untrusted)


def test_the_preferred_service_of_the_last_descriptor_counts() -> None:
    def service(kind: str, uri: str, priority: int) -> str:
        uris = f"<URI priority='9'>https://no/</URI><URI priority='1'>{uri}</URI>"
        return f"<Service priority='{priority}'><Type>{kind}</Type>{uris}</Service>"

    head = '<xrds:XRDS xmlns:xrds="xri://$xrds" xmlns="xri://$xrd*($v*2.0)">'
    document = (
        f"{head}<XRD>{service(SERVICE_SIGNON, 'https://first/', 20)}</XRD><XRD>"
        f"{service(SERVICE_SIGNON, 'https://c/', 30)}{service(SERVICE_SIGNON, 'https://b/', 10)}"
        f"{service(SERVICE_SERVER, 'https://a/', 2)}<Service><Type>x</Type></Service></XRD></xrds:XRDS>"
    )
    assert [found.uri for found in parse_xrds(document.encode())] == ["https://a/", "https://b/", "https://c/"]


def test_the_ways_to_a_provider() -> None:
    world = World()
    world.pages |= {
        f"{OP}/signon": SIGNON,
        f"{OP}/header": HttpResponse(200, {**HTML, XRDS_LOCATION.lower(): f"{OP}/signon"}, b""),
        f"{OP}/relative": HttpResponse(200, {**HTML, XRDS_LOCATION: "/signon"}, b""),
        f"{OP}/meta": HttpResponse(200, HTML, html_document(xrds_location=f"{OP}/signon")),
        f"{OP}/link": HttpResponse(200, HTML, html_document(endpoint_url=ENDPOINT)),
        f"{OP}/local": HttpResponse(200, HTML, html_document(endpoint_url=ENDPOINT, local_id="https://me.test/")),
        f"{OP}/moved": HttpResponse(302, {"Location": "/header"}),
    }
    for path in ("header", "relative", "meta", "link"):
        service = world.run(world.party.discover(f"{OP}/{path}"))
        assert (service.endpoint, service.claimed_id, service.local_id) == (ENDPOINT, f"{OP}/{path}", f"{OP}/{path}")
    assert world.run(world.party.discover(f"{OP}/local")).local_id == "https://me.test/"
    assert world.run(world.party.discover(f"{OP}/moved")).claimed_id == f"{OP}/header", "where the redirects end"
    assert world.run(world.party.discover(f"{OP}/")).claimed_id == IDENTIFIER_SELECT
    assert world.run(world.party.discover(ALICE)).claimed_id == ALICE


@pytest.mark.parametrize(
    "url",
    [
        "http://op.test/",
        "https://op.test:8443/",
        "https://169.254.169.254/",
        "https://localhost/",
        "https://op.test@evil.test/",
        "https://op.test.evil.test/",
        "file:///etc/passwd",
        "gopher://op.test/",
        "",
    ],
)
@pytest.mark.parametrize("way", ["identifier", "redirect", "header", "meta", "link", "document"])
def test_no_other_place_is_ever_asked(url: str, way: str) -> None:
    world = World()
    page = {
        "identifier": HttpResponse(404),
        "redirect": HttpResponse(302, {"Location": url}),
        "header": HttpResponse(200, {**HTML, XRDS_LOCATION: url}),
        "meta": HttpResponse(200, HTML, html_document(xrds_location=url)),
        "link": HttpResponse(200, HTML, html_document(endpoint_url=url)),
        "document": xrds(xrds_document(url, service_type=SERVICE_SIGNON)),
    }[way]
    world.pages[f"{OP}/x"] = page
    with pytest.raises((FetchRefusedError, DiscoveryError)):
        world.run(world.party.discover(url if way == "identifier" else f"{OP}/x"))
    assert [request.url for request in world.requests] == ([] if way == "identifier" else [f"{OP}/x"])


def test_http_needs_to_be_allowed_by_an_unsafe_name() -> None:
    with pytest.raises(FetchRefusedError):
        FetchPolicy(["http://127.0.0.1:1"]).check("http://127.0.0.1:1/")
    FetchPolicy(["http://127.0.0.1:1"], unsafe_allow_http=True).check("http://127.0.0.1:1/")
    with pytest.raises(ValueError, match="admits nothing"):
        FetchPolicy([])


def test_what_is_not_found_is_said() -> None:
    world = World()
    world.pages |= {
        f"{OP}/loop": HttpResponse(302, {"Location": f"{OP}/loop"}),
        f"{OP}/gone": HttpResponse(404),
        f"{OP}/empty": HttpResponse(200, HTML, b"<html>"),
        f"{OP}/bomb": xrds(BOMB),
        f"{OP}/long": xrds(b" " * (MAX_BODY + 1)),
        f"{OP}/other": xrds(xrds_document(ENDPOINT, service_type="http://openid.net/signon/1.1")),
        f"{OP}/body": HttpResponse(200, HTML, b"<body>" + html_document(endpoint_url=ENDPOINT)),
    }
    for path in ("loop", "gone", "empty", "bomb", "long", "other", "body", "nobody"):
        with pytest.raises(OpenIdError):
            world.run(world.party.discover(f"{OP}/{path}"))
    assert sum(request.url == f"{OP}/loop" for request in world.requests) == MAX_REDIRECTS + 1


def test_an_xrds_without_openid_leaves_html_to_be_tried() -> None:
    world = World()
    world.pages[f"{OP}/other"] = xrds(xrds_document(ENDPOINT, service_type="urn:something"))
    world.pages[f"{OP}/x"] = HttpResponse(200, HTML, html_document(xrds_location=f"{OP}/other", endpoint_url=ENDPOINT))
    assert world.run(world.party.discover(f"{OP}/x")).endpoint == ENDPOINT
