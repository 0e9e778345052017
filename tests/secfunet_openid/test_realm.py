"""Realms, return_to and URLs (§9.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.openid.errors import OpenIdFormatError, RealmError
from secfunet.openid.realm import check_return_to, parse_url

MATCHES = [
    ("https://a.test/", "https://a.test/"),
    ("https://a.test", "https://a.test/x?y=1"),
    ("https://a.test/x", "https://a.test/x"),
    ("https://a.test/x", "https://a.test/x/y"),
    ("https://a.test/x/", "https://a.test/x/y?z"),
    ("https://*.a.test/", "https://b.a.test/"),
    ("https://*.a.test/", "https://c.b.a.test:443/"),
    ("https://*.a.test/", "https://a.test/"),
    ("https://A.test/", "https://a.TEST/x"),
    ("http://127.0.0.1:8080/", "http://127.0.0.1:8080/return"),
    ("https://[::1]:8443/", "https://[::1]:8443/return"),
]
REFUSED = [
    ("https://a.test/", "http://a.test/", "another scheme"),
    ("https://a.test/", "https://a.test:8443/", "another port"),
    ("https://a.test:8443/", "https://a.test/", "another port"),
    ("https://a.test/", "https://b.test/", "another host"),
    ("https://a.test/", "https://a.test.evil.test/", "another host"),
    ("https://*.a.test/", "https://evila.test/", "no label border"),
    ("https://*.a.test/", "https://a.test.evil.test/", "another host"),
    ("https://a.test/x", "https://a.test/xy", "no path border"),
    ("https://a.test/x/", "https://a.test/", "outside of the path"),
    ("https://a.test/x/", "https://a.test/x/../y", "dot segments"),
    ("https://a.test/x/", "https://a.test/x/%2e%2e/y", "encoded dot segments"),
    ("https://a.test/x/", "https://a.test/x/..%2fy", "encoded slash"),
    ("https://a.test/x/", "https://a.test/x/%5c..%5cy", "encoded backslash"),
    ("https://a.test/", "https://a.test/#x", "fragment"),
    ("https://a.test/", "https://a.test/#", "empty fragment"),
    ("https://a.test/#x", "https://a.test/", "fragment in the realm"),
    ("https://a.test/?x", "https://a.test/?x", "query in the realm"),
    ("https://u@a.test/", "https://a.test/", "user in the realm"),
    ("https://a.test/", "https://a.test@evil.test/", "user in the return_to"),
    ("https://a.test/", "https://u:p@a.test/", "user in the return_to"),
    ("https://*.test/", "https://a.test/", "wildcard over a whole domain"),
    ("https://*/", "https://a.test/", "wildcard over all"),
    ("https://a.*.test/", "https://a.b.test/", "wildcard in the middle"),
    ("https://*a.test/", "https://xa.test/", "wildcard inside a label"),
    ("https://*.1.2.3.4/", "https://x.1.2.3.4/", "wildcard over an address"),
    ("ftp://a.test/", "ftp://a.test/", "scheme"),
    ("https://a.test/", "//a.test/", "no scheme"),
    ("https://a.test/", "https://a.test:/", "empty port"),
    ("https://a.test/", "https://a.test:0/", "no port"),
    ("https://a.test/", "https://a.test:99999/", "no port"),
    ("https://a.test/", "https://a.test/ x", "space"),
    ("https://a.test/", "https://a.test/\n", "newline"),
    ("https://a.test/", "https:\\\\a.test/", "backslashes"),
    ("https://a.test/", "https://a.test/" + "x" * 2048, "too long"),
    ("", "https://a.test/", "empty"),
]


@pytest.mark.parametrize(("realm", "return_to"), MATCHES)
def test_within(realm: str, return_to: str) -> None:
    check_return_to(return_to, realm)


@pytest.mark.parametrize(("realm", "return_to", "why"), REFUSED, ids=lambda value: None)
def test_outside(realm: str, return_to: str, why: str) -> None:
    with pytest.raises(RealmError):
        check_return_to(return_to, realm)


@given(st.text(max_size=60) | st.from_regex(r"https?://[a-z*.\[\]:@0-9]{0,20}[/?#a-z%.]{0,20}", fullmatch=True))
def test_any_text_is_a_url_or_the_error_and_its_normal_form_is_stable(untrusted: str) -> None:
    try:
        url = parse_url(untrusted)
    except OpenIdFormatError:
        return
    assert parse_url(str(url)) == url


@given(
    st.text(max_size=40) | st.sampled_from([realm for realm, *_ in REFUSED]),
    st.text(max_size=40) | st.sampled_from([url for _, url, _ in REFUSED]),
)
def test_what_matches_has_the_realms_scheme_and_port(realm: str, return_to: str) -> None:
    try:
        url = check_return_to(return_to, realm)
    except RealmError:
        return
    accepted = parse_url(realm, wildcard=True)
    assert (url.scheme, url.port) == (accepted.scheme, accepted.port)
    assert url.host == accepted.host or f".{url.host}".endswith(accepted.host.removeprefix("*"))


def test_origins_leave_out_the_port_of_the_scheme() -> None:
    assert parse_url("HTTPS://A.test:443/x").origin == "https://a.test"
    assert parse_url("http://a.test:443/x").origin == "http://a.test:443"
    assert parse_url("https://[::1]/").origin == "https://[::1]"
