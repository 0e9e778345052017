"""Does this certificate name the server that was meant (RFC 9525)? Chains and dates are the card's matter."""

from __future__ import annotations

import ipaddress

import service_identity
from cryptography import x509
from service_identity.hazmat import (
    DNS_ID,
    CertificatePattern,
    DNSPattern,
    IPAddress_ID,
    IPAddressPattern,
    ServiceID,
    verify_service_identity,
)

from secfunet.tls.errors import ServerNameError


def verify_server_name(untrusted_certificate: bytes, expected: str) -> None:
    """Check the DER certificate of a server against a DNS name or an IP address.

    Only subjectAltName counts, never the common name. Raises ServerNameError, also for a certificate that does not parse.
    """
    if not expected:
        raise ServerNameError(expected, "no name was expected")
    try:
        patterns = _patterns(x509.load_der_x509_certificate(untrusted_certificate))
        verify_service_identity(patterns, obligatory_ids=[_service_id(expected)], optional_ids=[])
    except service_identity.VerificationError:
        raise ServerNameError(expected, "it names others") from None
    except Exception as error:  # noqa: BLE001 - whatever the libraries make of such bytes
        raise ServerNameError(expected, f"it cannot be read ({type(error).__name__})") from None


def _patterns(certificate: x509.Certificate) -> list[CertificatePattern]:
    """DNS names and IP addresses. Not service_identity's own reader: it fails on a URN among the alternative names, such as the role of
    a grid's certificate.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *(DNSPattern.from_bytes(name.encode("utf-8")) for name in names.get_values_for_type(x509.DNSName)),
        *(
            IPAddressPattern(address)
            for address in names.get_values_for_type(x509.IPAddress)
            if isinstance(address, ipaddress.IPv4Address | ipaddress.IPv6Address)
        ),
    ]


def _service_id(expected: str) -> ServiceID:
    try:
        ipaddress.ip_address(expected)
    except ValueError:
        return DNS_ID(expected)
    return IPAddress_ID(expected)
