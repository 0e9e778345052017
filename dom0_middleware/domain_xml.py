"""A domain's XML, built as a tree (never by pasting text), and the VMID that is bound to the domain in its metadata."""

from __future__ import annotations

import hashlib
import re
from string import Template
from xml.etree import ElementTree

from dom0_middleware.domain_template import DomainTemplate
from dom0_middleware.hypervisor import DomainSpec

NAMESPACE = "https://secfunet.org/xmlns/domain/1"
PREFIX = "secfunet"
_VMID = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_METADATA = 4096

ElementTree.register_namespace(PREFIX, NAMESPACE)


def domain_xml(spec: DomainSpec, *, domain_type: str, template: DomainTemplate | None = None) -> str:
    """The definition of ``spec`` for libvirt (https://libvirt.org/formatdomain.html).

    ``template`` is a domain XML of dom0's administrator (operating system, devices); name, UUID, memory, vcpus and metadata of ``spec``
    replace what it says of them. In its texts and attributes ``${name}``, ``${uuid}``, ``${vmid}``, ``${mac}`` (``mac_address``) and
    ``${address}`` stand for the domain's own.
    """
    root = template.copy() if template is not None else _bare_domain(domain_type)
    _fill_in(root, spec)
    _set(root, "name", spec.name)
    _set(root, "uuid", spec.uuid)
    for name in ("memory", "currentMemory"):
        _set(root, name, str(spec.memory_mib)).set("unit", "MiB")
    # All of them can be used at once; where they run is the template's to say.
    _set(root, "vcpu", str(spec.vcpus)).attrib.pop("current", None)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ElementTree.SubElement(root, "metadata")
    for old in metadata.findall(f"{{{NAMESPACE}}}vm"):
        metadata.remove(old)
    vm = ElementTree.SubElement(metadata, f"{{{NAMESPACE}}}vm")
    ElementTree.SubElement(vm, f"{{{NAMESPACE}}}vmid").text = spec.vmid
    return ElementTree.tostring(root, encoding="unicode")


def mac_address(uuid: str) -> str:
    """The MAC address of a domain's first interface: Xen's OUI, and three bytes of its UUID's SHA-256."""
    return "00:16:3e:" + ":".join(f"{byte:02x}" for byte in hashlib.sha256(uuid.encode("ascii")).digest()[:3])


def _fill_in(root: ElementTree.Element, spec: DomainSpec) -> None:
    """In the parsed tree: no value can become XML."""
    values = {
        "name": spec.name,
        "uuid": spec.uuid,
        "vmid": spec.vmid,
        "mac": mac_address(spec.uuid),
        "address": spec.address,
    }

    def filled(text: str) -> str:
        return Template(text).safe_substitute(values)

    for element in root.iter():
        if element.text:
            element.text = filled(element.text)
        for name, value in element.attrib.items():
            element.set(name, filled(value))


def has_nvram(xml: str) -> bool:
    """A definition, as libvirt prints it, names a file with the variables of its firmware."""
    return ElementTree.fromstring(xml).find("os/nvram") is not None  # noqa: S314 - libvirt's own print


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
    """The one child of that name, with that text and nothing else in it."""
    element, *others = root.findall(name) or [ElementTree.SubElement(root, name)]
    for other in others:
        root.remove(other)
    for child in list(element):
        element.remove(child)
    element.text = text
    return element
