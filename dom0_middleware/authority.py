"""A small certificate authority of dom0's own (P-256): one for agents in guests, another for orchestrators.

Neither has anything to do with the grid's authority: they only say who may talk to this daemon.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dom0_middleware.errors import MiddlewareError, Reason
from secfunet.service.files import read_secret, write_atomically

AUTHORITY_LIFETIME = 10 * 365 * 86400.0  # seconds
# The name in the certificates of all our servers, whatever socket they are reached by.
SERVER_NAME = "secure-middleware"
# A guest's clock may lag behind dom0's.
BACKDATE = 300.0  # seconds

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class AuthorityError(MiddlewareError):
    """An authority's files are missing or damaged."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(Reason.INTERNAL, f"{path}: {problem}")
        self.path = path


class Authority:
    """Key and certificate of one authority. ``clock``: UTC seconds."""

    def __init__(
        self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, *, clock: Callable[[], float]
    ) -> None:
        self._key = key
        self._clock = clock
        self.certificate = certificate
        self.certificate_der = certificate.public_bytes(serialization.Encoding.DER)
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()})"

    @classmethod
    def create(cls, stem: Path, common_name: str, *, clock: Callable[[], float]) -> Authority:
        """Makes ``stem``.key (0600) and ``stem``.pem. Raises AuthorityError if they are there already."""
        if _key_path(stem).exists():
            raise AuthorityError(_key_path(stem), "exists already")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        now = clock()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(now - BACKDATE))
            .not_valid_after(_time(now + AUTHORITY_LIFETIME))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_atomically(_key_path(stem), private_key_pem(key))
        write_atomically(_certificate_path(stem), certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        return cls(key, certificate, clock=clock)

    @classmethod
    def load(cls, stem: Path, *, clock: Callable[[], float]) -> Authority:
        """Raises AuthorityError, or UnsafeFileError if others may read the key."""
        try:
            key = serialization.load_pem_private_key(read_secret(_key_path(stem)), password=None)
            certificate = x509.load_pem_x509_certificate(_certificate_path(stem).read_bytes())
        except FileNotFoundError as error:
            raise AuthorityError(Path(str(error.filename)), "is missing: run 'secure-middleware init'") from None
        except (ValueError, x509.InvalidVersion) as error:
            raise AuthorityError(stem, f"cannot be read: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise AuthorityError(_key_path(stem), "is not the key of the certificate beside it")
        return cls(key, certificate, clock=clock)

    def issue(
        self,
        public_key: PublicKey,
        *,
        common_name: str,
        names: Sequence[x509.GeneralName],
        server: bool,
        lifetime: float | None,
    ) -> x509.Certificate:
        """A certificate for ``lifetime`` seconds (None: as long as the authority's own), for one end of TLS only."""
        now = self._clock()
        end = self.certificate.not_valid_after_utc
        if lifetime is not None:
            end = min(end, _time(now + lifetime))
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(now - BACKDATE))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def server_pair(self, server_name: str) -> tuple[bytes, bytes]:
        """A fresh key and certificate (PEM) for one of our servers; the key lives in this process only."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.issue(
            key.public_key(), common_name=server_name, names=[x509.DNSName(server_name)], server=True, lifetime=None
        )
        return private_key_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def uri_names(certificate: x509.Certificate) -> list[str]:
    """The URIs in the certificate's subject alternative name; empty if it has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # noqa: BLE001 - the library raises more kinds than it documents
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _key_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".key")


def _certificate_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".pem")


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
