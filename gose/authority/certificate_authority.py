"""The CA of a grid: says whose public key is whose (X.509, RFC 5280).

Every certificate has a random serial number (159 bits), begins five minutes before it was issued (clocks differ), ends no later
than the CA's, and carries the key identifiers of its own key and of the CA's. What is asked for is checked first: a request
signs itself (RFC 2986, 4.2), so its key's private half is where the request was made.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from gose.authority.errors import IssuanceError
from gose.authority.ledger import Action, AuthorityRecord, OnRecord, unrecorded
from secfunet.host_names import HostNameError, canonical_host
from secfunet.identity import (
    CONTAINER_AUTHORITY_URI,
    CONTAINER_SIGNING,
    Holder,
    IdentityError,
    Role,
    check_name,
    check_rsa_size,
    der_of,
    has_server_names,
    purposes_of,
    role_uri,
    thumbprint,
)

AuthorityKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
HolderKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

BACKDATING: Final = timedelta(minutes=5)
CA_VALIDITY: Final = timedelta(days=3652)
MAX_REQUEST_SIZE: Final = 16384
"""The largest certificate signing request that is parsed, bytes."""

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)


def new_authority_key(algorithm: str) -> AuthorityKey:
    """A key for a CA: ``p-384`` or ``rsa-3072``. Raises IssuanceError."""
    if algorithm == "p-384":
        return ec.generate_private_key(ec.SECP384R1())
    if algorithm == "rsa-3072":
        return rsa.generate_private_key(65537, 3072)
    raise IssuanceError("a CA's key is p-384 or rsa-3072")


class CertificateAuthority:
    """A CA's key and certificate. What it issues for a holder is on ``record`` before it is handed out."""

    def __init__(self, key: AuthorityKey, certificate: x509.Certificate, *, record: OnRecord = unrecorded) -> None:
        if certificate.public_key() != key.public_key():
            raise IssuanceError("the CA's certificate is not for the CA's key")
        self._key = key
        self.certificate = certificate
        self.record = record

    @classmethod
    def create(cls, name: str, key: AuthorityKey, *, now: float) -> CertificateAuthority:
        """A self-signed CA that may issue certificates for holders, and no other CA (path length 0). ``now``: UTC seconds."""
        begin = _moment(now)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin - BACKDATING)
            .not_valid_after(begin + CA_VALIDITY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(certificates=True), critical=True)
            .add_extension(key_id, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False)
        )
        return cls(key, builder.sign(key, _hash(key)))

    def issue(
        self,
        holder: Holder,
        key: HolderKey,
        *,
        now: float,
        valid: float,
        server_names: Iterable[str] = (),
        seid: str | None = None,
    ) -> x509.Certificate:
        """A certificate that names ``holder``. ``now``: UTC seconds; ``valid``: seconds; ``server_names``: DNS names and IP
        addresses (servers and nodes only); ``seid``: of the secure element with the key, for the record.

        Raises IssuanceError for a key that is too weak or does not fit the role, IdentityError for a name that is none, and AuditError.
        """
        check_holder_key(holder.role, key)
        names = [_server_name(name) for name in dict.fromkeys(server_names)]
        if bool(names) != has_server_names(holder.role):
            raise IssuanceError("servers and nodes have DNS names or IP addresses, and nobody else")
        certificate = self._sign(
            holder.name,
            key,
            alternatives=[x509.UniformResourceIdentifier(role_uri(holder)), *names],
            purposes=purposes_of(holder.role),
            usage=_key_usage(signatures=True, key_transport=isinstance(key, rsa.RSAPublicKey)),
            now=now,
            valid=valid,
        )
        self.record(
            AuthorityRecord(
                Action.CERTIFICATE,
                "permitted",
                role=holder.role,
                name=holder.name,
                seid=seid or "",
                thumbprint=thumbprint(der_of(certificate)),
                until=int(certificate.not_valid_after_utc.timestamp()),
            )
        )
        return certificate

    def issue_container_authority(self, key: rsa.RSAPublicKey, *, now: float, valid: float) -> x509.Certificate:
        """The certificate of the container authority: good for trailers, and for no TLS."""
        return self._sign(
            "container-authority",
            key,
            alternatives=[x509.UniformResourceIdentifier(CONTAINER_AUTHORITY_URI)],
            purposes=(CONTAINER_SIGNING,),
            usage=_key_usage(signatures=True),
            now=now,
            valid=valid,
        )

    def _sign(
        self,
        name: str,
        key: HolderKey,
        *,
        alternatives: list[x509.GeneralName],
        purposes: Iterable[x509.ObjectIdentifier],
        usage: x509.KeyUsage,
        now: float,
        valid: float,
    ) -> x509.Certificate:
        begin = _moment(now)
        if not 0 < valid <= CA_VALIDITY.total_seconds():
            raise IssuanceError("a certificate is valid for more than nothing and at most ten years")
        end = min(begin + timedelta(seconds=int(valid)), self.certificate.not_valid_after_utc)
        if end <= begin or begin < self.certificate.not_valid_before_utc:
            raise IssuanceError("the CA's own certificate is not valid now")
        issuer_key_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(begin - BACKDATING, self.certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id), critical=False
            )
            .sign(self._key, _hash(self._key))
        )


def check_request(untrusted: bytes, expected: Holder) -> HolderKey:
    """The key of a certificate signing request (PKCS#10, DER) that a card made for ``expected``.

    Raises IssuanceError unless the request parses, its common name is the holder's, its key fits the role, and its signature is
    that key's. Nothing else in it is looked at, or finds its way into the certificate.
    """
    if len(untrusted) > MAX_REQUEST_SIZE:
        raise IssuanceError(f"a certificate signing request has at most {MAX_REQUEST_SIZE} bytes")
    try:
        request = x509.load_der_x509_csr(untrusted)
        names = [attribute.value for attribute in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        key = request.public_key()
        if isinstance(key, rsa.RSAPublicKey):
            check_rsa_size(key)
        is_signed = request.is_signature_valid
    except IdentityError as error:
        raise IssuanceError(f"the certificate signing request has {error}") from error
    except Exception as error:  # the library raises more kinds than it documents
        raise IssuanceError("not a certificate signing request") from error
    if not is_signed:
        raise IssuanceError("the certificate signing request is not signed by its own key")
    if names != [expected.name]:
        raise IssuanceError(f"the certificate signing request is not for '{expected.name}'")
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise IssuanceError("the key is neither RSA nor on an elliptic curve")
    check_holder_key(expected.role, key)
    return key


def check_holder_key(role: Role, key: HolderKey) -> None:
    """Raises IssuanceError unless the key is RSA of 2048 to 4096 bits or, but not for those for whom containers are made (hypervisors
    and users), on P-256 or P-384.
    """
    if isinstance(key, rsa.RSAPublicKey):
        if not 2048 <= key.key_size <= 4096 or key.public_numbers().e < 65537:
            raise IssuanceError("an RSA key has 2048 to 4096 bits and an exponent of at least 65537")
    elif role in (Role.HYPERVISOR, Role.USER):
        raise IssuanceError(f"a {role}'s key is RSA: containers are made for it")
    elif not isinstance(key.curve, _CURVES):
        raise IssuanceError("a key on an elliptic curve is on P-256 or P-384")


def _server_name(name: str) -> x509.GeneralName:
    try:
        host = canonical_host(name)
    except HostNameError as error:
        raise IssuanceError(str(error)) from None
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _moment(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)


def _hash(key: AuthorityKey) -> hashes.SHA256 | hashes.SHA384:
    return hashes.SHA384() if isinstance(key, ec.EllipticCurvePrivateKey) else hashes.SHA256()


def _key_usage(*, signatures: bool = False, key_transport: bool = False, certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signatures,
        content_commitment=False,
        key_encipherment=key_transport,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
