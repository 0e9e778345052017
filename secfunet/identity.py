"""Who a certificate of a grid names: a hypervisor, a VM, a server, a node or a user; and its short form, the thumbprint.

A grid's CA marks each certificate that it issues: the subject's common name is the holder's name, and one URI among the subject's
alternative names says what the holder is and repeats the name, ``urn:secfunet:<role>:<name>``. The extended key usage says what TLS
may use it for: client (hypervisor, VM, user), server, or both (node). A certificate that does not say all of this in agreement has no role.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from secfunet.errors import SecFuNetError

MAX_CERTIFICATE_SIZE: Final = 16384
"""The largest certificate that is parsed, bytes of DER; its PEM text may be half as long again."""

THUMBPRINT_SIZE: Final = 43
"""Characters of a thumbprint."""

MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 4096
MAX_RSA_EXPONENT: Final = 2**64
"""A public exponent is smaller: the time that an operation with somebody else's key takes grows with it, up to a hundredfold."""

MAX_NAME_SIZE: Final = 64
"""Characters of a holder's name: the upper bound of a common name (RFC 5280, appendix A.1, ub-common-name)."""

CONTAINER_AUTHORITY_URI: Final = "urn:secfunet:authority:containers"
"""The URI that marks the certificate of a grid's container authority."""

CONTAINER_SIGNING: Final = x509.ObjectIdentifier("2.25.227014359604482312907743850937283401529")
"""Its extended key usage: nothing but the trailers of containers (an OID under the UUID arc, ITU-T X.667)."""

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What anybody and anything with a name in a grid or a dom0 is called: holders, orchestrators, destinations."""
NAME_WORDS: Final = "1 to 64 letters, digits, '.', '_' and '-', of which the first is a letter or digit"

_NAME: Final = re.compile(NAME_PATTERN, re.ASCII)
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]", re.ASCII)
_URN: Final = "urn:secfunet:"
_PEM_BEGIN: Final = b"-----BEGIN "
_PEM_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"


class IdentityProblem(Enum):
    """What is wrong with an identity."""

    MALFORMED = "is no certificate"
    TOO_LARGE = "is too large"
    NAME = "has no usable name"
    ROLE = "has no role in a grid, or another one"
    PURPOSE = "may not be used for that"
    KEY = "has a key of the wrong kind"
    ISSUER = "was not issued by this authority"
    NOT_YET_VALID = "is not valid yet"
    EXPIRED = "has expired"


class IdentityError(SecFuNetError):
    """A certificate, a request for one, or a name cannot be used; ``problem`` says why."""

    def __init__(self, problem: IdentityProblem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Role(StrEnum):
    """What the holder of a certificate is; the value stands in its URI, and in the registry of a grid (which has no nodes and users).

    A node is a host that lends its cards to grids by RACS, or a grid that uses such cards. A user is a person who has a card.
    """

    HYPERVISOR = "hypervisor"
    VM = "vm"
    SERVER = "server"
    NODE = "node"
    USER = "user"


class Holder(NamedTuple):
    """Whom a certificate names."""

    role: Role
    name: str


def thumbprint(certificate_der: bytes) -> str:
    """The short form of an identity (VMID, HVID): base64url of the SHA-256 of the DER certificate (RFC 7515, 4.1.8), 43 characters."""
    return base64.urlsafe_b64encode(hashlib.sha256(certificate_der).digest()).rstrip(b"=").decode("ascii")


def check_thumbprint(untrusted: str) -> str:
    """Returns ``untrusted`` if it is the base64url form, without padding, of 32 bytes. Raises IdentityError."""
    if not isinstance(untrusted, str) or _THUMBPRINT.fullmatch(untrusted) is None:
        raise IdentityError(IdentityProblem.MALFORMED, "a thumbprint is 43 characters of base64url")
    return untrusted


def check_name(untrusted: str) -> str:
    """Returns ``untrusted`` if a holder may be called so: 1 to 64 of A-Z a-z 0-9 . _ -, the first one a letter or digit.

    Raises IdentityError.
    """
    if not isinstance(untrusted, str) or _NAME.fullmatch(untrusted) is None:
        raise IdentityError(
            IdentityProblem.NAME,
            "a name has 1 to 64 letters, digits, '.', '_' or '-', and begins with a letter or digit",
        )
    return untrusted


def role_uri(holder: Holder) -> str:
    """The URI that marks a certificate of ``holder``."""
    return f"{_URN}{holder.role}:{check_name(holder.name)}"


def load_certificate(untrusted: bytes) -> x509.Certificate:
    """One certificate, in DER or PEM (RFC 7468; exactly one, text around it is ignored). Raises IdentityError.

    Total: any bytes give a certificate, whose names, extensions and times can be read, or an IdentityError.
    """
    if len(untrusted) > MAX_CERTIFICATE_SIZE * 3 // 2:
        raise IdentityError(IdentityProblem.TOO_LARGE, f"a certificate has at most {MAX_CERTIFICATE_SIZE} bytes")
    try:
        if _PEM_BEGIN in untrusted:
            if untrusted.count(_PEM_BEGIN) != 1:
                raise IdentityError(IdentityProblem.MALFORMED, "there is more than one certificate")
            certificate = x509.load_pem_x509_certificate(untrusted)
        else:
            certificate = x509.load_der_x509_certificate(untrusted)
        # What cryptography parses lazily is parsed here, so that nothing fails later, elsewhere.
        _ = certificate.subject, certificate.issuer, certificate.extensions, certificate.version
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.serial_number
        size = len(der_of(certificate))
    except IdentityError:
        raise
    except Exception as error:  # the library raises more kinds than it documents: TypeError for some names
        raise IdentityError(IdentityProblem.MALFORMED, "not an X.509 certificate") from error
    if size > MAX_CERTIFICATE_SIZE:
        raise IdentityError(IdentityProblem.TOO_LARGE, f"a certificate has at most {MAX_CERTIFICATE_SIZE} bytes")
    return certificate


def der_of(certificate: x509.Certificate) -> bytes:
    """The DER encoding."""
    return certificate.public_bytes(serialization.Encoding.DER)


def pem_of(certificate_der: bytes) -> bytes:
    """The PEM encoding (RFC 7468) of a certificate in DER, which is not looked at."""
    body = base64.encodebytes(certificate_der).replace(b"\n", b"")
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    return b"\n".join((_PEM_CERTIFICATE, *lines, b"-----END CERTIFICATE-----", b""))


def rsa_key_of(certificate: x509.Certificate) -> rsa.RSAPublicKey:
    """The certificate's key, which must be RSA as ``check_rsa_size`` has it: containers are made for such keys. Raises IdentityError."""
    try:
        key = certificate.public_key()
    except UnsupportedAlgorithm as error:
        raise IdentityError(IdentityProblem.KEY, "the certificate's public key is of an unknown kind") from error
    except Exception as error:  # as in load_certificate
        raise IdentityError(IdentityProblem.KEY, "the certificate's public key is unreadable") from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise IdentityError(IdentityProblem.KEY, "the certificate's key is not RSA of 2048 to 4096 bits")
    check_rsa_size(key)
    return key


def check_rsa_size(key: rsa.RSAPublicKey) -> None:
    """Raises IdentityError unless the modulus has 2048 to 4096 bits and the exponent is below 2^64.

    For a key that somebody else chose, before anything is computed with it: each operation costs what its owner wants otherwise.
    """
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise IdentityError(
            IdentityProblem.KEY,
            f"an RSA key of {key.key_size} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} bits are accepted",
        )
    if key.public_numbers().e >= MAX_RSA_EXPONENT:
        raise IdentityError(IdentityProblem.KEY, "an RSA key whose public exponent has more than 64 bits")


def role_of(certificate: x509.Certificate) -> Holder:
    """Whom the certificate names.

    Raises IdentityError unless it has one common name, one URI of ours that repeats it, and the extended key usage of that role.
    It says nothing about who issued it: see verify_certificate.
    """
    try:
        extensions = certificate.extensions
        common_names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        uris = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )
        purposes = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        raise IdentityError(IdentityProblem.ROLE, "the certificate does not say what its holder is") from None
    except Exception as error:  # as in load_certificate
        raise IdentityError(IdentityProblem.MALFORMED, "the certificate's extensions are unreadable") from error
    marks = [uri for uri in uris if uri.startswith(_URN)]
    if len(marks) != 1 or len(common_names) != 1:
        raise IdentityError(IdentityProblem.ROLE, "the certificate does not name one holder")
    role_text, separator, name = marks[0].removeprefix(_URN).partition(":")
    if not separator or role_text not in list(Role):
        raise IdentityError(IdentityProblem.ROLE, "the certificate names a role that does not exist")
    holder = Holder(Role(role_text), check_name(name))
    if common_names[0].value != holder.name:
        raise IdentityError(IdentityProblem.NAME, "the certificate's common name is not the name of its holder")
    if purposes != set(purposes_of(holder.role)):
        raise IdentityError(
            IdentityProblem.PURPOSE, f"the certificate's extended key usage is not that of a {holder.role}"
        )
    return holder


def purposes_of(role: Role) -> tuple[x509.ObjectIdentifier, ...]:
    """The extended key usage of a role (RFC 5280, 4.2.1.12)."""
    return _PURPOSES[role]


def has_server_names(role: Role) -> bool:
    """Whether certificates of that role carry DNS names or IP addresses: those that a TLS server may show."""
    return ExtendedKeyUsageOID.SERVER_AUTH in _PURPOSES[role]


_PURPOSES: Final = {
    Role.HYPERVISOR: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.VM: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.SERVER: (ExtendedKeyUsageOID.SERVER_AUTH,),
    Role.USER: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.NODE: (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH),
}


def verify_certificate(certificate: x509.Certificate, authority: x509.Certificate, *, role: Role, now: float) -> Holder:
    """Checks a certificate of a grid against the grid's CA; returns its holder. Raises IdentityError.

    The rules, in their order: it is signed by the CA's key and names the CA as its issuer; ``now`` (UTC seconds) is within its
    validity; it is no CA itself; it has a role, and that role is ``role``. Revocation is the registry's to know.
    """
    _check_issuer(certificate, authority)
    check_validity(certificate, now)
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except Exception:  # noqa: BLE001 - as in load_certificate
        raise IdentityError(IdentityProblem.PURPOSE, "the certificate does not say that it is no CA") from None
    if basic.ca:
        raise IdentityError(IdentityProblem.PURPOSE, "the certificate is that of a CA")
    holder = role_of(certificate)
    if holder.role is not role:
        raise IdentityError(IdentityProblem.ROLE, f"the certificate is that of a {holder.role}, not of a {role}")
    return holder


def verify_container_authority(
    certificate: x509.Certificate, authority: x509.Certificate, *, now: float
) -> rsa.RSAPublicKey:
    """Checks the certificate of a grid's container authority against the grid's CA; returns its key. Raises IdentityError.

    The rules, in their order: issued by the CA; ``now`` (UTC seconds) is within its validity; its URI and its extended key
    usage are those of a container authority, and nothing else; its key is RSA.
    """
    _check_issuer(certificate, authority)
    check_validity(certificate, now)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except Exception:  # noqa: BLE001 - as in load_certificate
        raise IdentityError(IdentityProblem.ROLE, "the certificate is not that of a container authority") from None
    if list(names) != [x509.UniformResourceIdentifier(CONTAINER_AUTHORITY_URI)]:
        raise IdentityError(IdentityProblem.ROLE, "the certificate is not that of a container authority")
    if purposes != {CONTAINER_SIGNING}:
        raise IdentityError(IdentityProblem.PURPOSE, "the certificate is not for signing containers")
    return rsa_key_of(certificate)


def _check_issuer(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception as error:  # InvalidSignature; and what the library makes of an unreadable one
        raise IdentityError(IdentityProblem.ISSUER, "the certificate was not issued by this grid's CA") from error


def check_validity(certificate: x509.Certificate, now: float) -> None:
    """Raises IdentityError unless ``now`` (UTC seconds) is within the certificate's validity, both ends included (RFC 5280,
    4.1.2.5).
    """
    try:
        moment = datetime.fromtimestamp(now, UTC)
    except (ValueError, OverflowError, OSError):
        raise IdentityError(IdentityProblem.EXPIRED, "that time is out of range") from None
    if moment < certificate.not_valid_before_utc:
        raise IdentityError(IdentityProblem.NOT_YET_VALID, "the certificate is not valid yet")
    if moment.replace(microsecond=0) > certificate.not_valid_after_utc:
        raise IdentityError(IdentityProblem.EXPIRED, "the certificate has expired")
