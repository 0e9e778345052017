"""A small PKI made in the tests: authorities, and TLS-Ids as a card holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from secure_element.eap_engine import TlsIdView

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
BOTH = (CLIENT, SERVER)
DAY = timedelta(days=1)


@cache
def rsa_key(number: int = 0) -> rsa.RSAPrivateKey:
    """RSA-2048; made once a test run for each number."""
    return rsa.generate_private_key(65537, 2048)


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_of(kind: str) -> PrivateKey:
    return rsa_key() if kind == "rsa" else ec_key()


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: PrivateKey


def _builder(
    subject: str, public_key: object, issuer: x509.Name, since: timedelta, until: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(public_key)  # type: ignore[arg-type]  # either kind of public key
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + since)
        .not_valid_after(now + until)
    )


def authority(
    name: str = "Test CA", *, parent: Authority | None = None, since: timedelta = -DAY, until: timedelta = 30 * DAY
) -> Authority:
    key = ec_key()
    issuer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) if parent is None else parent.certificate.subject
    )
    certificate = (
        _builder(name, key.public_key(), issuer, since, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),
            critical=True,
        )
        .sign(key if parent is None else parent.key, hashes.SHA256())
    )
    return Authority(certificate, key)


def tls_id(
    issuer: Authority,
    name: str = "card",
    *,
    kind: str = "ec",
    usages: Sequence[x509.ObjectIdentifier] = BOTH,
    since: timedelta = -DAY,
    until: timedelta = 30 * DAY,
    authorities: Sequence[Authority] | None = None,
    key: PrivateKey | None = None,
) -> TlsIdView:
    own = key or key_of(kind)
    builder = _builder(name, own.public_key(), issuer.certificate.subject, since, until).add_extension(
        x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
    trusted = [issuer] if authorities is None else authorities
    return TlsIdView(
        name=name,
        eap_id=f"{name}@secfunet".encode(),
        certificate=builder.sign(issuer.key, hashes.SHA256()),
        authorities=tuple(one.certificate for one in trusted),
        private_key=own,
    )
