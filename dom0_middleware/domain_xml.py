"""A domain's XML, built as a tree (never by pasting text), and the VMID that is bound to the domain in its metadata."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from dom0_middleware.hypervisor import DomainSpec

NAMESPACE = "https://secfunet.org/xmlns/domain/1"
PREFIX = "secfunet"
_VMID = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_METADATA = 4096

ElementTree.register_namespace(PREFIX, NAMESPACE)


def domain_xml(spec: DomainSpec, *, domain_type: str, template: str | None = None) -> str:
    """The definition of ``spec`` for libvirt (https://libvirt.org/formatdomain.html).

    ``template`` is a domain XML of dom0's administrator (operating system, devices); name, UUID, memory, vcpus and metadata of ``spec``
    replace what it says of them. Raises ElementTree.ParseError if it is no XML, ValueError if its root is no <domain>.
    """
    # The template is dom0's own file, not a guest's.
    root = ElementTree.fromstring(template) if template else _bare_domain(domain_type)  # noqa: S314
    if root.tag != "domain":
        raise ValueError(f"the template's root is <{root.tag}>, not <domain>")
    _set(root, "name", spec.name)
    _set(root, "uuid", spec.uuid)
    for name in ("memory", "currentMemory"):
        _set(root, name, str(spec.memory_mib)).set("unit", "MiB")
    _set(root, "vcpu", str(spec.vcpus))
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ElementTree.SubElement(root, "metadata")
    for old in metadata.findall(f"{{{NAMESPACE}}}vm"):
        metadata.remove(old)
    vm = ElementTree.SubElement(metadata, f"{{{NAMESPACE}}}vm")
    ElementTree.SubElement(vm, f"{{{NAMESPACE}}}vmid").text = spec.vmid
    return ElementTree.tostring(root, encoding="unicode")


def vmid_in(metadata_xml: str) -> str | None:
    """The VMID in a domain's metadata element (as virDomainGetMetadata gives it); None if there is none of the right form."""
    if len(metadata_xml) > _MAX_METADATA:
        return None
    try:
        # libvirt parsed and printed it again: no document type, no entities; and it is short.
        root = ElementTree.fromstring(metadata_xml)  # noqa: S314
    except ElementTree.ParseError:
        return None
    # libvirt gives the element with or without its namespace, by version.
    text = next((child.text or "" for child in root if child.tag in ("vmid", f"{{{NAMESPACE}}}vmid")), "")
    return text if _VMID.fullmatch(text) else None


def _bare_domain(domain_type: str) -> ElementTree.Element:
    root = ElementTree.Element("domain", {"type": domain_type})
    system = ElementTree.SubElement(root, "os")
    ElementTree.SubElement(system, "type").text = "linux" if domain_type == "xen" else "hvm"
    return root


def _set(root: ElementTree.Element, name: str, text: str) -> ElementTree.Element:
    element = root.find(name)
    if element is None:
        element = ElementTree.SubElement(root, name)
    element.text = text
    return element
