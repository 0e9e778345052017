"""What an orchestrator says of a VM becomes a record, or is refused; and whether a domain is that VM's."""

from __future__ import annotations

import time
import uuid as uuids
from ipaddress import ip_address

from cryptography import x509

from dom0_middleware.errors import Reason, Refused
from dom0_middleware.hypervisor import DomainInfo, DomainSpec
from dom0_middleware.state import VmRecord
from secfunet.identity import (
    IdentityError,
    IdentityProblem,
    Role,
    check_name,
    der_of,
    load_certificate,
    role_of,
    thumbprint,
    verify_certificate,
)
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.vm_auth_token import LEEWAY, TokenError, VmAuthToken, unverified_claims

DEFAULT_MEMORY_MIB, DEFAULT_VCPUS = 512, 1
MAX_MEMORY_MIB, MAX_VCPUS = 1 << 20, 256


def new_record(
    untrusted: pb.VmDefinition,
    *,
    authority: x509.Certificate,
    vm_auth_token: str,
    now: float,
    arriving: bool = False,
) -> VmRecord:
    """``authority``: the grid's CA. Raises Refused: REQUEST_INVALID, VM_CERTIFICATE_INVALID, TOKEN_INVALID, TOKEN_EXPIRED."""
    name = _parse_name(untrusted.name)
    memory_mib, vcpus = untrusted.memory_mib or DEFAULT_MEMORY_MIB, untrusted.vcpus or DEFAULT_VCPUS
    if memory_mib > MAX_MEMORY_MIB or vcpus > MAX_VCPUS:
        raise Refused(Reason.REQUEST_INVALID, f"a VM has at most {MAX_MEMORY_MIB} MiB of memory and {MAX_VCPUS} vcpus")
    certificate = _parse_certificate(untrusted.vm_certificate, authority, now)
    record = VmRecord(
        uuid=parse_uuid(untrusted.uuid),
        name=name,
        vmid=thumbprint(certificate),
        vm_certificate=certificate,
        vm_auth_token=vm_auth_token,
        memory_mib=memory_mib,
        vcpus=vcpus,
        revoked=False,
        created_at=now,
        address=_parse_address(untrusted.address),
        arriving=arriving,
    )
    if vm_auth_token:
        check_token(record, vm_auth_token, now)
    return record


def definition(record: VmRecord) -> pb.VmDefinition:
    """What another host needs to know of the VM."""
    return pb.VmDefinition(
        uuid=record.uuid,
        name=record.name,
        vm_certificate=record.vm_certificate,
        memory_mib=record.memory_mib,
        vcpus=record.vcpus,
        address=record.address,
    )


def check_token(record: VmRecord, untrusted: str, now: float) -> VmAuthToken:
    """What the token claims. Spares the orchestrator a mistake; the token's signature is the grid's to check."""
    try:
        claims = unverified_claims(untrusted)
    except TokenError:
        raise Refused(Reason.TOKEN_INVALID, "this is no VM-Auth-Token") from None
    if claims.vmid != record.vmid:
        raise Refused(Reason.TOKEN_INVALID, "this VM-Auth-Token is for another VMID")
    if claims.expires_at <= now:
        raise Refused(Reason.TOKEN_EXPIRED, "this VM-Auth-Token has ended")
    if now + LEEWAY < (begin := max(claims.not_before, claims.issued_at)):
        raise Refused(
            Reason.TOKEN_NOT_YET_VALID,
            f"this VM-Auth-Token is valid from {_time(begin)}, and it is {_time(now)} by this host's clock: compare the clocks of this "
            "host and of the grid's authority",
        )
    return claims


def clock_of_token(record: VmRecord, now: float) -> str:
    """What this host's clock has against the VM's token, or ""."""
    try:
        check_token(record, record.vm_auth_token, now)
    except Refused as error:
        return str(error)
    return ""


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def spec(record: VmRecord) -> DomainSpec:
    """What its domain is defined from."""
    return DomainSpec(record.uuid, record.name, record.vmid, record.memory_mib, record.vcpus, record.address)


def bound(record: VmRecord, info: DomainInfo) -> bool:
    """The domain is the one that was defined for this VM: same UUID, same name, same VMID in its metadata."""
    return info.uuid == record.uuid and info.name == record.name and info.vmid == record.vmid


def parse_uuid(untrusted: str) -> str:
    """Raises Refused (REQUEST_INVALID)."""
    try:
        return str(uuids.UUID(untrusted))
    except ValueError:
        raise Refused(Reason.REQUEST_INVALID, "a VM is named by its UUID") from None


def _parse_name(untrusted: str) -> str:
    """As the grid names VMs; and nothing that could be taken for another VM's UUID."""
    try:
        check_name(untrusted)
    except IdentityError as error:
        raise Refused(Reason.REQUEST_INVALID, f"a VM cannot be called so: {error}") from None
    try:
        uuids.UUID(untrusted)
    except ValueError:
        return untrusted
    raise Refused(
        Reason.REQUEST_INVALID, "a VM cannot have a UUID for its name: commands could not tell which VM is meant"
    )


def _parse_certificate(untrusted: bytes, authority: x509.Certificate, now: float) -> bytes:
    try:
        certificate = load_certificate(untrusted)
        verify_certificate(certificate, authority, role=Role.VM, now=now)
    except IdentityError as error:
        if error.problem is IdentityProblem.MALFORMED or error.problem is IdentityProblem.TOO_LARGE:
            raise Refused(Reason.VM_CERTIFICATE_INVALID, f"the VM's certificate cannot be read: {error}") from None
        raise Refused(
            Reason.VM_CERTIFICATE_INVALID,
            f"this is the certificate of {_whose(certificate)}: it cannot be a VM's identity: {error}",
        ) from None
    return der_of(certificate)


def _whose(certificate: x509.Certificate) -> str:
    """For a message."""
    try:
        holder = role_of(certificate)
    except IdentityError:
        return f"'{certificate.subject.rfc4514_string()[:100]}'"
    return f"{holder.role} {holder.name}"


def _parse_address(untrusted: str) -> str:
    try:
        return str(ip_address(untrusted)) if untrusted else ""
    except ValueError:
        raise Refused(Reason.REQUEST_INVALID, "a VM's address is an IP address") from None
