"""Certificates for a RADIUS server and a card, of every kind that matters, and one authentication."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.card.parameters import TLS_1_2, TLS_1_3, TlsParameters
from secfunet.radius.access import AccessClient
from secfunet.radius.peer import Authenticated, authenticate
from secfunet.radius.udp import radius_port
from tests.interop_radius.freeradius import SECRET, FreeRadius
from tests.support.cards import CardProcess
from tests.support.pki import CertificateAuthority, key_pem

VERSIONS = {"1.2": TLS_1_2, "1.3": TLS_1_3}
NAME = "radius.example"


class ServerIdentity:
    """Key and chain of a RADIUS server, as running_freeradius takes them."""

    def __init__(
        self, ca: CertificateAuthority, *, names: Sequence[x509.GeneralName] = (), expired: bool = False
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        times = {"not_before": timedelta(hours=-2), "not_after": timedelta(hours=-1)} if expired else {}
        names = [x509.DNSName(NAME), *names]
        self.certificate = ca.issue(self.key.public_key(), NAME, names=names, client=False, **times)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def files(self) -> dict[str, Any]:
        return {"key": key_pem(self.key), "chain": [self.pem]}


def long_names(size: int) -> list[x509.GeneralName]:
    """Alternative names that make a certificate about ``size`` bytes longer."""
    return [x509.DNSName(f"{os.urandom(30).hex()}.{os.urandom(30).hex()}.example") for _ in range(size // 132)]


def intermediate(root: CertificateAuthority, padding: int) -> CertificateAuthority:
    """A CA below ``root``, with a certificate that is ``padding`` bytes longer than it need be."""
    below = CertificateAuthority("Intermediate CA")
    builder = (
        x509.CertificateBuilder()
        .subject_name(below.certificate.subject)
        .issuer_name(root.certificate.subject)
        .public_key(below.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(below.certificate.not_valid_before_utc)
        .not_valid_after(below.certificate.not_valid_after_utc)
    )
    for extension in below.certificate.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    if padding:
        builder = builder.add_extension(x509.SubjectAlternativeName(long_names(padding)), critical=False)
    below.certificate = builder.sign(root.key, SHA256())
    return below


def crl_of(ca: CertificateAuthority, *revoked: x509.Certificate) -> bytes:
    """PEM."""
    now = ca.certificate.not_valid_before_utc
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject)
    builder = builder.last_update(now).next_update(now + timedelta(days=1))
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(ca.key, SHA256()).public_bytes(Encoding.PEM)


async def run(
    card: CardProcess,
    identity: str,
    radius: FreeRadius,
    version: str,
    *,
    secret: bytes = SECRET,
    mtu: int = 1400,
    patience: float = 10,
) -> tuple[Authenticated, bytes]:
    """One authentication, and the card's MSK; the card is given back."""
    client = await card.connect(identity)
    try:
        low = high = VERSIONS[version]
        await client.set_tls_parameters(TlsParameters(min_version=low, max_version=high, resume=False))
        async with radius_port("127.0.0.1", radius.port, patience=patience) as port:
            done = await authenticate(
                client, AccessClient(secret, nas="here", mtu=mtu), port.exchange, unix_time=int(time.time())
            )
        return done, (await client.session_key(extended=True))[:64]
    finally:
        await client.close()


async def load(
    card: CardProcess, name: str, certificate_of: Any, authorities: list[CertificateAuthority], *, key: Any = None
) -> x509.Certificate:
    """Gives the card an identity; ``certificate_of`` makes the certificate of its public key."""
    administrator = await card.administer()
    try:
        await administrator.generate_key(name, key)
        request = x509.load_der_x509_csr(await administrator.certificate_signing_request(name, name))
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        certificate: x509.Certificate = certificate_of(public)
        der = certificate.public_bytes(Encoding.DER)
        await administrator.load_identity(name, name.encode(), der, [one.der for one in authorities])
    finally:
        await administrator.close()
    return certificate
