"""Host names in one spelling, so that they can be compared as text: each name or URL of a settings file goes through here.

A name is in lower case, in ASCII (IDNA, RFC 3490), without the final dot of the DNS's root; an address is as ``ipaddress`` writes it.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from secfunet.errors import SecFuNetError

MAX_NAME: Final = 253
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


class HostNameError(SecFuNetError, ValueError):
    """That is no name of a host; the message says why."""


def canonical_host(text: str) -> str:
    """The name of a host, or its address (IPv6 without brackets), in its one spelling. Raises HostNameError."""
    try:
        return ipaddress.ip_address(text).compressed
    except ValueError:
        pass
    if "*" in text:
        raise HostNameError(f"'{text}' has a wildcard: write the names of the hosts themselves")
    name = text[:-1] if text.endswith(".") else text
    try:
        # An empty label, or one that is too long, is an error of the codec's, too.
        ascii_name = name.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise HostNameError(f"'{text}' is neither a DNS name nor an IP address") from error
    labels = ascii_name.split(".")
    if len(ascii_name) > MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise HostNameError(
            f"'{text}' is neither a DNS name nor an IP address: a name's parts have letters, digits and inner hyphens, 63 at most"
        )
    if labels[-1].isdigit():
        raise HostNameError(f"'{text}' is neither a DNS name nor an IP address: its last part is a number")
    return ascii_name


def canonical_url(text: str) -> str:
    """An absolute URL as a person writes it, with its host in its one spelling; the rest is left to who parses it. Raises HostNameError."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise HostNameError(f"'{text}' is no URL") from None
    if not host or "@" in parts.netloc:
        raise HostNameError(f"'{text}' is no absolute http or https URL without user information")
    name = host.removeprefix("*.")  # of a realm
    name = f"{host[: len(host) - len(name)]}{canonical_host(name)}"
    netloc = f"[{name}]" if ":" in name else name
    return urlunsplit(parts._replace(netloc=netloc if port is None else f"{netloc}:{port}"))
