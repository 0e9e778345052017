"""A domain's XML: whatever is in the texts stays text, and libvirt reads back what was meant."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0_middleware.domain_xml import NAMESPACE, domain_xml, vmid_in
from dom0_middleware.hypervisor import DomainSpec

VMID = "A" * 42 + "_"
TEMPLATE = """
<domain type="xen"><name>template</name><uuid>x</uuid><memory unit="KiB">1</memory>
<metadata><other xmlns="urn:other">kept</other><s:vm xmlns:s="https://secfunet.org/xmlns/domain/1"><s:vmid>old</s:vmid></s:vm></metadata>
<os><type>linux</type><kernel>/boot/vmlinuz</kernel></os><devices><console type="pty"/></devices></domain>
"""


def parse(xml: str) -> ElementTree.Element:
    return ElementTree.fromstring(xml)  # noqa: S314 - our own output


def spec(name: str = "web", vmid: str = VMID) -> DomainSpec:
    return DomainSpec("11111111-2222-4333-8444-555555555555", name, vmid, 64, 2)


def test_the_binding_is_in_the_metadata() -> None:
    root = parse(domain_xml(spec(), domain_type="xen"))
    assert root.get("type") == "xen"
    assert root.findtext(f"metadata/{{{NAMESPACE}}}vm/{{{NAMESPACE}}}vmid") == VMID


def test_a_template_keeps_its_devices_and_loses_its_name() -> None:
    root = parse(domain_xml(spec(), domain_type="test", template=TEMPLATE))
    assert root.get("type") == "xen"
    assert root.findtext("name") == "web"
    assert root.findtext("uuid") == spec().uuid
    assert (root.findtext("memory"), root.find("memory").get("unit")) == ("64", "MiB")  # type: ignore[union-attr]
    assert root.findtext("os/kernel") == "/boot/vmlinuz"
    assert root.find("devices/console") is not None
    assert root.findtext("metadata/{urn:other}other") == "kept"
    assert [e.text for e in root.iter(f"{{{NAMESPACE}}}vmid")] == [VMID]


@pytest.mark.parametrize("template", ["<network/>", "no xml", "<domain>"])
def test_a_template_that_is_none(template: str) -> None:
    with pytest.raises((ValueError, ElementTree.ParseError)):
        domain_xml(spec(), domain_type="test", template=template)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0xD7FF), max_size=80))
def test_no_name_breaks_out_of_its_element(name: str) -> None:
    root = parse(domain_xml(spec(name), domain_type="test"))
    assert (root.findtext("name") or "") == name
    assert [element.tag for element in root] == ["os", "name", "uuid", "memory", "currentMemory", "vcpu", "metadata"]


@pytest.mark.parametrize(
    ("metadata", "vmid"),
    [
        (f"<vm><vmid>{VMID}</vmid></vm>", VMID),
        (f'<s:vm xmlns:s="{NAMESPACE}"><s:vmid>{VMID}</s:vmid></s:vm>', VMID),
        ("<vm><vmid>short</vmid></vm>", None),
        ("<vm/>", None),
        ("", None),
        ("<vm><vmid>" + "A" * 5000 + "</vmid></vm>", None),
    ],
)
def test_the_binding_read_back(metadata: str, vmid: str | None) -> None:
    assert vmid_in(metadata) == vmid


@given(st.text(max_size=200))
def test_any_metadata_is_a_vmid_or_none(metadata: str) -> None:
    found = vmid_in(metadata)
    assert found is None or len(found) == 43
