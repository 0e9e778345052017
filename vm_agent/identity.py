"""Who this VM is, as dom0 says: its certificate, the hypervisor's, and whose signature makes a container good."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from secfunet.identity import IdentityError, load_certificate, rsa_key_of, thumbprint
from secfunet.middleware.v1 import agent_pb2
from vm_agent.errors import IdentityUnusableError


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """Parsed identity: all that is needed to check an answer."""

    vm_certificate: bytes = field(repr=False)  # X.509, DER
    vm_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey = field(repr=False)
    vmid: str  # thumbprint
    hvid: str  # thumbprint
    container_authority: rsa.RSAPublicKey = field(repr=False)
    header_size: int  # bytes of a container's header: the hypervisor's RSA modulus
    authorised_until: int  # UTC seconds
    operations: tuple[str, ...]


def parse_identity(untrusted: agent_pb2.Identity) -> VmIdentity:
    """Raises IdentityUnusableError, and nothing else, if the certificates do not parse or their keys are not of the kind they must be."""
    try:
        vm_key = _certificate(untrusted.vm_certificate, "VM's").public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise IdentityUnusableError("the VM's certificate has a key that cannot be read") from None
    if not isinstance(vm_key, (rsa.RSAPublicKey, ec.EllipticCurvePublicKey)):
        raise IdentityUnusableError("the VM's certificate has a key that is neither RSA nor EC")
    hypervisor_key = _rsa_key(untrusted.hypervisor_certificate, "hypervisor's")
    return VmIdentity(
        vm_certificate=untrusted.vm_certificate,
        vm_key=vm_key,
        vmid=thumbprint(untrusted.vm_certificate),
        hvid=thumbprint(untrusted.hypervisor_certificate),
        container_authority=_rsa_key(untrusted.container_authority, "container authority's"),
        header_size=hypervisor_key.key_size // 8,
        authorised_until=untrusted.authorised_until,
        operations=tuple(untrusted.operations[:16]),
    )


def _certificate(untrusted: bytes, whose: str) -> x509.Certificate:
    if not untrusted:
        raise IdentityUnusableError(f"the middleware has no {whose} certificate for this VM")
    try:
        return load_certificate(untrusted)
    except IdentityError as error:
        raise IdentityUnusableError(f"the {whose} certificate cannot be used: {error}") from error


def _rsa_key(untrusted: bytes, whose: str) -> rsa.RSAPublicKey:
    try:
        return rsa_key_of(_certificate(untrusted, whose))
    except IdentityError as error:
        raise IdentityUnusableError(f"the {whose} certificate cannot be used: {error}") from error
