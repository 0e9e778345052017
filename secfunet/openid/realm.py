"""Realms and return_to URLs (§9.2): whom a provider answers, and where.

Stricter than the specification where that costs honest parties nothing: no user information, no query in a realm, no dot segments and
no encoded slashes in a path (a browser might resolve them to outside of the realm), and a wildcard only above a name of two labels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

from secfunet.openid.errors import OpenIdFormatError, RealmError

MAX_URL = 2048
_DEFAULT_PORTS = {"https": 443, "http": 80}
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,2048}")
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class WebUrl:
    """An absolute http or https URL, taken apart; ``host`` in lower case and without a final dot, an address in its one spelling; the port
    always there, the path never empty.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str
    fragment: str

    @property
    def origin(self) -> str:
        """scheme://host[:port], the port only where it is not the scheme's own (RFC 6454 §6.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}")

    def __str__(self) -> str:
        """The normalised URL (RFC 3986 §6.2.2.1, §6.2.3)."""
        return (
            self.origin
            + self.path
            + (f"?{self.query}" if self.query else "")
            + (f"#{self.fragment}" if self.fragment else "")
        )


def parse_url(untrusted: str, *, wildcard: bool = False) -> WebUrl:
    """Raises OpenIdFormatError unless this is an absolute http(s) URL without user information; ``wildcard``: "*." may precede the host."""
    if not _URL_CHARACTERS.fullmatch(untrusted):
        raise OpenIdFormatError("a URL is empty, too long or has characters that a URL cannot have")
    try:
        parts = urlsplit(untrusted)
        port = parts.port
    except ValueError:
        raise OpenIdFormatError("this is no URL") from None
    host = (parts.hostname or "").lower().removesuffix(".")
    if parts.scheme not in _DEFAULT_PORTS or not host or "@" in parts.netloc or port == 0 or "\\" in untrusted:
        raise OpenIdFormatError("this is no absolute http or https URL without user information")
    if parts.netloc.endswith(":"):
        raise OpenIdFormatError("a URL has an empty port")
    bracketed = "[" in parts.netloc
    _check_host(host.removeprefix("*.") if wildcard else host, bracketed=bracketed)
    if bracketed:
        host = ip_address(host).compressed
    return WebUrl(
        parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], parts.path or "/", parts.query, parts.fragment
    )


def _check_host(host: str, *, bracketed: bool) -> None:
    if bracketed:
        try:
            if ip_address(host).version == 6 and "%" not in host:
                return
        except ValueError:
            pass
        raise OpenIdFormatError("a URL's host is no IPv6 address")
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise OpenIdFormatError("a URL's host is no name and no address")


def check_realm(untrusted: str) -> WebUrl:
    """The realm, if it may be trusted at all: RealmError otherwise."""
    try:
        realm = parse_url(untrusted, wildcard=True)
    except OpenIdFormatError as error:
        raise RealmError(f"the realm cannot be used: {error}") from None
    if realm.fragment or "#" in untrusted or realm.query or "?" in untrusted:
        raise RealmError("a realm has no fragment and no query")
    if realm.host.startswith("*."):
        name = realm.host[2:]
        # "*.com" would be the realm of everybody (§9.2 leaves the list of such names to the provider); an address has no names below it.
        if "." not in name or _is_address(name):
            raise RealmError("the realm's wildcard covers too much")
    _check_path(realm.path)
    return realm


def same_url(untrusted: str, ours: str) -> bool:
    """Whether both name the same place, whatever their spelling; what is no URL names none."""
    try:
        return str(parse_url(untrusted)) == str(parse_url(ours))
    except OpenIdFormatError:
        return False


def check_return_to(untrusted_return_to: str, untrusted_realm: str) -> WebUrl:
    """The return_to, if it lies within the realm (§9.2); RealmError otherwise."""
    realm = check_realm(untrusted_realm)
    try:
        url = parse_url(untrusted_return_to)
    except OpenIdFormatError as error:
        raise RealmError(f"the return_to cannot be used: {error}") from None
    if url.fragment or "#" in untrusted_return_to:
        raise RealmError("a return_to has no fragment")
    _check_path(url.path)
    if (url.scheme, url.port) != (realm.scheme, realm.port):
        raise RealmError("the return_to has another scheme or port than the realm")
    if realm.host.startswith("*."):
        if url.host != realm.host[2:] and not url.host.endswith(realm.host[1:]):
            raise RealmError("the return_to's host is outside of the realm")
    elif url.host != realm.host:
        raise RealmError("the return_to's host is outside of the realm")
    if url.path != realm.path and not url.path.startswith(realm.path if realm.path.endswith("/") else realm.path + "/"):
        raise RealmError("the return_to's path is outside of the realm")
    return url


def _check_path(path: str) -> None:
    segments = unquote(path).split("/")
    if "." in segments or ".." in segments or "\\" in unquote(path) or "%2f" in path.lower():
        raise RealmError("a path has dot segments or encoded slashes")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
