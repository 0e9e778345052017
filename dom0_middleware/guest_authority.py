"""The guest authority: it certifies the agent in a domain for an hour, and names the domain in the certificate.

A certificate is *current* while the run of the domain that it was issued in lasts; ``guest.GuestDomain`` keeps the current serials.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dom0_middleware.authority import SERVER_NAME, Authority, PublicKey, uri_names
from dom0_middleware.errors import Reason, Refused
from secfunet.identity import IdentityError, check_rsa_size, load_certificate

AGENT_LIFETIME = 3600.0  # seconds
MAX_REQUEST = 8192  # bytes of a certificate signing request
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_URN = "urn:uuid:"


@dataclass(frozen=True)
class AgentCertificate:
    """What an agent's certificate says: the domain, its serial number, its end (UTC seconds)."""

    uuid: str
    serial: int
    not_after: float


class GuestAuthority:
    """Issues agents' certificates; see ``Authority`` for its files."""

    def __init__(self, authority: Authority, *, agent_lifetime: float = AGENT_LIFETIME) -> None:
        self._authority = authority
        self._agent_lifetime = agent_lifetime

    @classmethod
    def load(
        cls, folder: Path, *, clock: Callable[[], float], agent_lifetime: float = AGENT_LIFETIME
    ) -> GuestAuthority:
        return cls(Authority.load(folder / "guest-authority", clock=clock), agent_lifetime=agent_lifetime)

    @classmethod
    def create(cls, folder: Path, *, clock: Callable[[], float]) -> GuestAuthority:
        return cls(Authority.create(folder / "guest-authority", "SecFuNet guest authority", clock=clock))

    @property
    def certificate_der(self) -> bytes:
        return self._authority.certificate_der

    @property
    def certificate_pem(self) -> bytes:
        return self._authority.certificate_pem

    def issue_agent(self, key: PublicKey, uuid: str) -> tuple[bytes, AgentCertificate]:
        """A certificate (DER) for ``key`` in the domain ``uuid``, and what it says."""
        certificate = self._authority.issue(
            key,
            common_name=uuid,
            names=[x509.UniformResourceIdentifier(_URN + uuid)],
            server=False,
            lifetime=self._agent_lifetime,
        )
        return certificate.public_bytes(serialization.Encoding.DER), _facts(certificate, uuid)

    def server_pair(self) -> tuple[bytes, bytes]:
        """Key and certificate (PEM) for one server of one domain."""
        return self._authority.server_pair(SERVER_NAME)


def parse_request(untrusted: bytes) -> PublicKey:
    """The public key of a PKCS#10 request (RFC 2986) whose self-signature holds. Its subject and attributes are ignored.

    Raises Refused (CSR_INVALID): too long, not DER, signature wrong, key neither NIST curve nor RSA of 2048 to 4096 bits with an
    exponent below 2^64. Takes no longer for any bytes than for an RSA key of 4096 bits.
    """
    if len(untrusted) > MAX_REQUEST:
        raise _bad_request(f"is longer than {MAX_REQUEST} bytes")
    try:
        request = x509.load_der_x509_csr(untrusted)
        key = request.public_key()
        # Kind, modulus and exponent first: the time that the signature check takes is otherwise the guest's choice.
        if isinstance(key, rsa.RSAPublicKey):
            check_rsa_size(key)
        elif not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
            raise _bad_request("has a key that is neither on P-256, P-384 or P-521 nor RSA")
        if not request.is_signature_valid:
            raise _bad_request("is not signed with its own key")
    except Refused:
        raise
    except IdentityError as error:
        raise _bad_request(f"has {error}") from None
    except Exception as error:  # the library raises more kinds than it documents
        raise _bad_request("cannot be parsed") from error
    return key


def agent_certificate(untrusted_pem: bytes) -> AgentCertificate:
    """What the certificate of a TLS peer says. TLS has checked who signed it and that its holder has the key; not whom it names.

    Raises Refused (CERTIFICATE_FOREIGN) if it names no domain, or several.
    """
    try:
        certificate = load_certificate(untrusted_pem)
        (name,) = uri_names(certificate)
        if not name.startswith(_URN):
            raise ValueError(name)
        uuid = str(uuids.UUID(name.removeprefix(_URN)))
    except (ValueError, IdentityError):
        raise Refused(Reason.CERTIFICATE_FOREIGN, "the certificate names no domain") from None
    return _facts(certificate, uuid)


def _facts(certificate: x509.Certificate, uuid: str) -> AgentCertificate:
    return AgentCertificate(uuid, certificate.serial_number, certificate.not_valid_after_utc.timestamp())


def _bad_request(problem: str) -> Refused:
    return Refused(Reason.CSR_INVALID, f"the certificate signing request {problem}")
