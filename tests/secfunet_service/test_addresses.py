"""One spelling for each address, and one count for each holder of addresses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.service.addresses import canonical_address, canonical_network, rate_key, text_of_address


@pytest.mark.parametrize(
    ("spelling", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:201", "192.0.2.1"),
        ("::ffff:192.0.2.1%eth0", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::1", "::1"),
        ("::192.0.2.1", "::c000:201"),  # IPv4-compatible, which is another address
    ],
)
def test_one_spelling(spelling: str, address: str) -> None:
    assert str(canonical_address(spelling)) == text_of_address(spelling) == address


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_that_address(address: IPv4Address) -> None:
    mapped = f"::ffff:{address}"
    assert canonical_address(mapped) == address
    assert rate_key(mapped) == rate_key(str(address)) == str(address)


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_a_holder_of_a_64_is_counted_once(address: IPv6Address, host: int) -> None:
    if address.ipv4_mapped is not None or int(address) >> 64 == 0:
        return
    neighbour = IPv6Address(int(address) >> 64 << 64 | host)
    assert rate_key(str(neighbour)) == rate_key(str(address))
    assert ip_address(address) in ip_network(rate_key(str(address)))


@pytest.mark.parametrize(
    ("spelling", "network"),
    [
        ("127.0.0.0/8", "127.0.0.0/8"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::/0", "::/0"),
    ],
)
def test_networks(spelling: str, network: str) -> None:
    assert str(canonical_network(spelling)) == network


@pytest.mark.parametrize("text", ["", "unix:", "localhost", "192.0.2.1:80", "%eth0", "::ffff:192.0.2.256"])
def test_what_is_not_an_address(text: str) -> None:
    with pytest.raises(ValueError):
        canonical_address(text)
    assert text_of_address(text) == rate_key(text) == text


def test_what_is_not_a_network() -> None:
    for text in ("192.0.2.1/24", "::ffff:192.0.2.1/120", "here"):
        with pytest.raises(ValueError):
            canonical_network(text)
