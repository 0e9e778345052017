"""Addresses of callers in one spelling each, so that they can be compared, counted and logged.

A dual-stack socket names an IPv4 caller by an IPv4-mapped IPv6 address ("::ffff:192.0.2.1", RFC 4291, 2.5.5.2); here that is the IPv4
address.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

IPV6_SITE: Final = 64
"""Bits of an IPv6 address that name its holder: the remaining ones are the holder's own choice (RFC 4291, 2.5.4)."""
_MAPPED: Final = IPv6Network("::ffff:0:0/96")


def canonical_address(untrusted: str) -> IPv4Address | IPv6Address:
    """The address without its zone ("%eth0"); an IPv4-mapped one as IPv4. Raises ValueError for text that is not an IP address."""
    address = ip_address(untrusted.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def canonical_network(untrusted: str) -> IPv4Network | IPv6Network:
    """A network in the spelling of canonical_address: "::ffff:192.0.2.0/120" is 192.0.2.0/24.

    Raises ValueError for text that is not a network, or that sets bits behind its prefix.
    """
    network = ip_network(untrusted)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        first = int(network.network_address) & 0xFFFFFFFF
        return IPv4Network((first, network.prefixlen - _MAPPED.prefixlen))
    return network


def text_of_address(untrusted: str) -> str:
    """For logs and comparisons: the canonical address as text; anything that is not an IP address stays as it is."""
    try:
        return str(canonical_address(untrusted))
    except ValueError:
        return untrusted


def rate_key(untrusted: str) -> str:
    """Under what a caller is counted where each address has a rate or a share: an IPv4 address, or the /64 of an IPv6 address, because
    one holder has all of it. Anything that is not an IP address is counted under itself.
    """
    try:
        address = canonical_address(untrusted)
    except ValueError:
        return untrusted
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((address, IPV6_SITE), strict=False))
