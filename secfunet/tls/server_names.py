"""Does this certificate name the server that was meant (RFC 9525)? Chains and dates are the card's matter."""

from __future__ import annotations

import ipaddress

import service_identity
from cryptography import x509
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from secfunet.tls.errors import ServerNameError


def verify_server_name(untrusted_certificate: bytes, expected: str) -> None:
    """Check the DER certificate of a server against a DNS name or an IP address.

    Only subjectAltName counts, never the common name. Raises ServerNameError, also for a certificate that does not parse.
    """
    if not expected:
        raise ServerNameError(expected, "no name was expected")
    try:
        certificate = x509.load_der_x509_certificate(untrusted_certificate)
        try:
            ipaddress.ip_address(expected)
        except ValueError:
            verify_certificate_hostname(certificate, expected)
        else:
            verify_certificate_ip_address(certificate, expected)
    except service_identity.VerificationError:
        raise ServerNameError(expected, "it names others") from None
    except (ValueError, service_identity.CertificateError) as error:
        raise ServerNameError(expected, f"it cannot be read ({type(error).__name__})") from None
