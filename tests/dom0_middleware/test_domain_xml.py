"""A domain's XML: whatever is in the texts stays text, and libvirt reads back what was meant."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0_middleware.domain_template import DomainTemplate, TemplateError
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


def template(text: str) -> DomainTemplate:
    return DomainTemplate.parse(text.encode(), Path("/t.xml"))


def spec(name: str = "web", vmid: str = VMID) -> DomainSpec:
    return DomainSpec("11111111-2222-4333-8444-555555555555", name, vmid, 64, 2)


def test_the_binding_is_in_the_metadata() -> None:
    root = parse(domain_xml(spec(), domain_type="xen"))
    assert root.get("type") == "xen"
    assert root.findtext(f"metadata/{{{NAMESPACE}}}vm/{{{NAMESPACE}}}vmid") == VMID


def test_a_template_keeps_its_devices_and_loses_its_name() -> None:
    root = parse(domain_xml(spec(), domain_type="test", template=template(TEMPLATE)))
    assert root.get("type") == "xen"
    assert root.findtext("name") == "web"
    assert root.findtext("uuid") == spec().uuid
    assert (root.findtext("memory"), root.find("memory").get("unit")) == ("64", "MiB")  # type: ignore[union-attr]
    assert root.findtext("os/kernel") == "/boot/vmlinuz"
    assert root.find("devices/console") is not None
    assert root.findtext("metadata/{urn:other}other") == "kept"
    assert [e.text for e in root.iter(f"{{{NAMESPACE}}}vmid")] == [VMID]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<network/>", "<network>"),
        ("no xml", "no XML"),
        ("<domain>", "no XML"),
        ("", "no XML"),
        ('<?xml version="1.0" encoding="no-such"?><domain/>', "no XML"),
        ('<domain xmlns="http://x"/>', "<{http://x}domain>"),
        ("<domain><maxMemory>1</maxMemory></domain>", "<maxMemory>"),
        ("<domain><cpu><numa><cell/></numa></cpu></domain>", "<cpu/numa>"),
        ('<domain><cpu><topology sockets="1" cores="2" threads="1"/></cpu></domain>', "<cpu/topology>"),
        ('<domain><vcpus><vcpu id="0"/></vcpus></domain>', "<vcpus>"),
        ('<domain><cputune><vcpupin vcpu="3" cpuset="0"/></cputune></domain>', "<cputune/vcpupin>"),
        ('<domain><devices><memory model="dimm"/></devices></domain>', "<devices/memory>"),
    ],
)
def test_a_template_that_is_none(text: str, named: str) -> None:
    with pytest.raises(TemplateError) as error:
        template(text)
    assert "'libvirt.template': /t.xml: " in str(error.value)
    assert named in str(error.value)


def test_a_template_in_another_encoding() -> None:
    text = '<?xml version="1.0" encoding="utf-16"?><domain type="xen"><title>Straße</title></domain>'
    root = parse(
        domain_xml(spec(), domain_type="xen", template=DomainTemplate.parse(text.encode("utf-16"), Path("/t")))
    )
    assert root.findtext("title") == "Straße"


def test_what_a_template_says_of_memory_and_vcpus_is_replaced() -> None:
    text = (
        '<domain><vcpu placement="static" cpuset="0-3" current="4">8</vcpu><vcpu>9</vcpu><memory unit="GiB">7</memory>'
        "<memory>8</memory><currentMemory>5</currentMemory></domain>"
    )
    root = parse(domain_xml(spec(), domain_type="xen", template=template(text)))
    assert [(e.text, e.attrib) for e in root.findall("vcpu")] == [("2", {"placement": "static", "cpuset": "0-3"})]
    for name in ("memory", "currentMemory"):
        assert [(e.text, e.attrib) for e in root.findall(name)] == [("64", {"unit": "MiB"})]


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
