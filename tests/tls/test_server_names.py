"""RFC 9525: only subjectAltName counts."""

from __future__ import annotations

import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.tls.errors import ServerNameError
from secfunet.tls.server_names import verify_server_name
from tests.support.pki import CertificateAuthority

AUTHORITY = CertificateAuthority()
PUBLIC_KEY = ec.generate_private_key(ec.SECP256R1()).public_key()


def certificate(*names: x509.GeneralName, common_name: str = "grid.example") -> bytes:
    return AUTHORITY.issue(PUBLIC_KEY, common_name, names=names).public_bytes(Encoding.DER)


GRID = x509.DNSName("grid.example")
URN = x509.UniformResourceIdentifier("urn:secfunet:server:web")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((GRID,), "grid.example"),
        ((GRID,), "GRID.example"),
        ((GRID, x509.DNSName("other.example")), "other.example"),
        ((x509.DNSName("*.grid.example"),), "a.grid.example"),
        # What stands beside the name, such as the role of a grid's certificate, is no obstacle.
        ((URN, GRID), "grid.example"),
        (
            (GRID, URN, x509.RFC822Name("a@grid.example"), x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))),
            "grid.example",
        ),
        ((URN, x509.IPAddress(ipaddress.ip_address("192.0.2.1"))), "192.0.2.1"),
        ((x509.IPAddress(ipaddress.ip_address("192.0.2.1")),), "192.0.2.1"),
        ((x509.IPAddress(ipaddress.ip_address("2001:db8::1")),), "2001:db8:0::1"),
    ],
)
def test_right_names(names: tuple[x509.GeneralName, ...], expected: str) -> None:
    verify_server_name(certificate(*names), expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "grid.example"),  # the common name alone
        ((GRID,), "evil.example"),
        ((GRID,), "a.grid.example"),
        ((GRID,), "grid.example.evil.example"),
        ((GRID,), ""),
        ((x509.DNSName("*.grid.example"),), "a.b.grid.example"),
        ((x509.DNSName("*.grid.example"),), "grid.example"),
        ((GRID,), "192.0.2.1"),
        ((URN,), "grid.example"),
        ((x509.UniformResourceIdentifier("https://grid.example/"),), "grid.example"),
        ((x509.DNSName("*"),), "grid"),
        ((x509.DNSName("*.example"), x509.DNSName("gr*d.example")), "grid.example.com"),
        ((x509.DNSName("a.*.example"),), "a.grid.example"),
        ((x509.DNSName("192.0.2.1"),), "192.0.2.1"),
        ((x509.IPAddress(ipaddress.ip_address("192.0.2.2")),), "192.0.2.1"),
    ],
)
def test_wrong_names(names: tuple[x509.GeneralName, ...], expected: str) -> None:
    with pytest.raises(ServerNameError) as caught:
        verify_server_name(certificate(*names), expected)
    assert caught.value.expected == expected


def test_what_is_no_certificate() -> None:
    with pytest.raises(ServerNameError):
        verify_server_name(b"nonsense", "grid.example")
