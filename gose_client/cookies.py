"""Cookies of the OpenID provider (RFC 6265), as much of them as a login needs: host-only, bounded, and for https only."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_COOKIES = 32
_PAIR = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128})=([\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{0,2048})")


@dataclass(frozen=True)
class _Cookie:
    value: str = field(repr=False)
    path: str
    ends_at: float


class CookieJar:
    """Cookies by host (ports share them, RFC 6265 §8.5), name and path. A cookie for a whole domain is not kept."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._cookies: dict[tuple[str, str, str], _Cookie] = {}

    def copy(self) -> CookieJar:
        """Another jar with the same cookies: logins that run at the same time do not take each other's."""
        twin = CookieJar(self._clock)
        twin._cookies = dict(self._cookies)
        return twin

    def update(self, other: CookieJar) -> None:
        """Takes over the other jar's cookies."""
        for key, cookie in other._cookies.items():
            self._keep(key, cookie)

    def take(self, host: str, untrusted_header: str) -> None:
        """One Set-Cookie header. What cannot be kept is left out: a login without it will be refused, not misled."""
        pair, *attributes = untrusted_header.split(";")
        match = _PAIR.fullmatch(pair.strip().replace('"', ""))
        if match is None:
            return
        path, ends_at = "/", float("inf")
        for attribute in attributes[:16]:
            name, _, value = attribute.strip().partition("=")
            match name.lower():
                case "domain" if value.strip():
                    return
                case "path" if value.startswith("/"):
                    path = value
                case "max-age" if re.fullmatch(r"-?[0-9]{1,10}", value):
                    ends_at = self._clock() + int(value) if int(value) > 0 else 0.0
        self._keep((host, match[1], path), _Cookie(match[2], path, ends_at))

    def header(self, host: str, path: str) -> str:
        """The value of the Cookie header; "" if there is none."""
        now = self._clock()
        return "; ".join(
            f"{name}={cookie.value}"
            for (owner, name, _), cookie in self._cookies.items()
            if owner == host and cookie.ends_at > now and _covers(cookie.path, path)
        )

    def _keep(self, key: tuple[str, str, str], cookie: _Cookie) -> None:
        self._cookies.pop(key, None)
        if cookie.ends_at > self._clock():
            self._cookies[key] = cookie
        while len(self._cookies) > MAX_COOKIES:
            del self._cookies[next(iter(self._cookies))]


def _covers(cookie_path: str, path: str) -> bool:
    return path == cookie_path or path.startswith(cookie_path if cookie_path.endswith("/") else cookie_path + "/")
