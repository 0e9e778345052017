"""What an orchestrator says of a VM becomes a record, or is refused; and whether a domain is that VM's."""

from __future__ import annotations

import re
import uuid as uuids
from ipaddress import ip_address

from dom0_middleware.errors import Reason, Refused
from dom0_middleware.hypervisor import DomainInfo, DomainSpec
from dom0_middleware.state import VmRecord
from secfunet.identity import IdentityError, check_validity, der_of, load_certificate, thumbprint
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.vm_auth_token import TokenError, VmAuthToken, unverified_claims

DEFAULT_MEMORY_MIB, DEFAULT_VCPUS = 512, 1
MAX_MEMORY_MIB, MAX_VCPUS = 1 << 20, 256
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_record(untrusted: pb.VmDefinition, *, vm_auth_token: str, now: float, arriving: bool = False) -> VmRecord:
    """Raises Refused: REQUEST_INVALID, VM_CERTIFICATE_INVALID, TOKEN_INVALID, TOKEN_EXPIRED."""
    if not _NAME.fullmatch(untrusted.name):
        raise Refused(Reason.REQUEST_INVALID, "a VM's name is 1 to 64 characters of [A-Za-z0-9._-]")
    memory_mib, vcpus = untrusted.memory_mib or DEFAULT_MEMORY_MIB, untrusted.vcpus or DEFAULT_VCPUS
    if memory_mib > MAX_MEMORY_MIB or vcpus > MAX_VCPUS:
        raise Refused(Reason.REQUEST_INVALID, f"a VM has at most {MAX_MEMORY_MIB} MiB of memory and {MAX_VCPUS} vcpus")
    certificate = _parse_certificate(untrusted.vm_certificate, now)
    record = VmRecord(
        uuid=parse_uuid(untrusted.uuid),
        name=untrusted.name,
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
    return claims


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


def _parse_certificate(untrusted: bytes, now: float) -> bytes:
    try:
        certificate = load_certificate(untrusted)
        check_validity(certificate, now)
    except IdentityError as error:
        raise Refused(Reason.VM_CERTIFICATE_INVALID, f"the VM's certificate cannot be used: {error}") from None
    return der_of(certificate)


def _parse_address(untrusted: str) -> str:
    try:
        return str(ip_address(untrusted)) if untrusted else ""
    except ValueError:
        raise Refused(Reason.REQUEST_INVALID, "a VM's address is an IP address") from None
