"""From a template and a request to a domain in libvirt: what was asked for, or nothing; and nothing is left when it goes."""

from __future__ import annotations

import asyncio
import time
import uuid as uuids

import grpc
import grpc.aio
import libvirt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dom0_middleware.domain_template import TemplateError
from dom0_middleware.errors import SettingUnusable
from gose.authority.certificate_authority import CertificateAuthority, new_authority_key
from secfunet.identity import Holder, Role, der_of, pem_of
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from tests.dom0_middleware.test_faults import FaultyHypervisor, faulty_world
from tests.dom0_middleware.test_lifecycle import refusal
from tests.dom0_middleware.world import TIMEOUT, World, certificate, facts, rsa_key

BARE = '<domain type="test">{}<os><type>hvm</type></os></domain>'


def domains(world: World) -> set[str]:
    return {domain.name() for domain in world.hold_hypervisor().listAllDomains()} - {"test"}


async def restart_with(world: World, template: str | bytes) -> None:
    """With that template; a World that could not be started is stopped."""
    await world.stop()
    path = world.folder / "t.xml"
    path.write_bytes(template if isinstance(template, bytes) else template.encode())
    world.extra = {"libvirt": {"heal_interval": 0.1, "template": "t.xml"}}
    await world.start()


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("<network/>", "<network>"),
        ("<domain><name>x</domain>", "no XML"),
        (BARE.format('<cpu><numa><cell id="0" cpus="0-3" memory="2" unit="GiB"/></numa></cpu>'), "<cpu/numa>"),
        # Well-formed, and nothing of ours: libvirt is who refuses it.
        (BARE.format('<vcpu cpuset="none">1</vcpu>'), "libvirt makes no domain"),
        ('<domain type="test"></domain>', "libvirt makes no domain"),
        (BARE.format("<devices><disk/></devices>"), "libvirt makes no domain"),
    ],
)
async def test_a_template_that_makes_no_domain_is_told_at_start(world: World, template: str, named: str) -> None:
    with pytest.raises(TemplateError) as error:
        await restart_with(world, template)
    assert f"'libvirt.template': {world.folder / 't.xml'}: " in str(error.value)
    assert named in str(error.value)
    assert domains(world) == set()
    # It can be started once it is right.
    await restart_with(world, BARE.format(""))
    await world.create()
    assert domains(world) == {"web"}


@pytest.mark.parametrize(
    "template",
    [
        BARE.format('<vcpu placement="static" current="4">8</vcpu>'),
        BARE.format(
            '<vcpu cpuset="0">2</vcpu><memory unit="GiB">9</memory><currentMemory unit="GiB">8</currentMemory>'
        ),
        BARE.format("<cputune><shares>2048</shares></cputune>"),
        b"\xef\xbb\xbf" + BARE.format("<!-- $5 ${name} --><title>${name}</title>").encode(),
    ],
)
@pytest.mark.parametrize(("memory_mib", "vcpus"), [(0, 0), (768, 4)])
async def test_a_vm_has_what_was_asked_for(world: World, template: str | bytes, memory_mib: int, vcpus: int) -> None:
    await restart_with(world, template)
    uuid = await world.create(memory_mib=memory_mib, vcpus=vcpus)
    domain = world.hold_hypervisor().lookupByUUIDString(uuid)
    await world.boot(uuid)
    _, maximum, memory, running_vcpus, _ = domain.info()
    assert (maximum, memory) == ((memory_mib or 512) * 1024,) * 2
    defined = libvirt.VIR_DOMAIN_VCPU_CONFIG
    maximum_vcpus = domain.vcpusFlags(defined | libvirt.VIR_DOMAIN_VCPU_MAXIMUM)
    assert (running_vcpus, domain.vcpusFlags(defined), maximum_vcpus) == ((vcpus or 1),) * 3


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyError("injected")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_creation_is_undone_whatever_it_failed_with(when: str, error: Exception) -> None:
    async with faulty_world() as (world, hypervisor):
        hypervisor.fail("define", when, error)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await world.create()
        assert facts(refused.value)[1] == "INTERNAL"
        hypervisor.heal()
        assert domains(world) == set()
        async with world.orchestrator() as stub:
            assert not (await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms


async def test_a_vm_that_cannot_be_defined_again_keeps_no_other_from_its_channel() -> None:
    async with faulty_world() as (world, _):
        guest = await world.enrolled("web")
        lost = await world.create("db")
        await world.stop()
        world.hold_hypervisor().lookupByUUIDString(lost).undefine()
        hypervisor = FaultyHypervisor()
        world.parts = {"hypervisor": hypervisor}
        hypervisor.fail("define", "before", RuntimeError("injected"))
        await world.start()
        await guest.show_certificate()
        async with world.orchestrator() as stub:
            vms = (await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms
        assert [(vm.name, vm.state) for vm in vms] == [("db", pb.VM_STATE_STOPPED), ("web", pb.VM_STATE_RUNNING)]


async def test_what_libvirt_kept_of_a_vm_goes_with_it(world: World) -> None:
    direct = world.hold_hypervisor()
    uuid = (await world.boot(await world.create())).uuid
    domain = direct.lookupByUUIDString(uuid)
    domain.snapshotCreateXML("<domainsnapshot/>")
    domain.managedSave()
    async with world.orchestrator() as stub:
        response = await stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT)
    assert list(response.also_removed) == ["its saved memory (managed save)", "what libvirt knew of its snapshots"]
    assert domains(world) == set()


async def test_firmware_variables_do_not_keep_a_vm(world: World) -> None:
    loader = '<loader readonly="yes" type="pflash">/a</loader><nvram>/tmp/${uuid}</nvram>'
    await restart_with(world, BARE.format("").replace("<os>", f"<os>{loader}"))
    uuid = await world.create()
    async with world.orchestrator() as stub:
        await stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT)
    assert domains(world) == set()


def of_another_grid() -> bytes:
    authority = CertificateAuthority.create("grid", new_authority_key("p-384"), now=time.time() - 3600)
    issued = authority.issue(Holder(Role.VM, "web"), rsa_key("web").public_key(), now=time.time(), valid=3600)
    return der_of(issued)


def self_signed() -> bytes:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "me")])
    issued = certificate_times(x509.CertificateBuilder().subject_name(name).issuer_name(name))
    return der_of(issued.public_key(key.public_key()).serial_number(1).sign(key, hashes.SHA256()))


def certificate_times(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    own = x509.load_der_x509_certificate(certificate("web"))
    return builder.not_valid_before(own.not_valid_before_utc).not_valid_after(own.not_valid_after_utc)


@pytest.mark.parametrize(
    ("make", "whose"),
    [
        (lambda: certificate("hypervisor"), "hypervisor hypervisor"),
        (lambda: certificate("container-authority"), "CN=container-authority"),
        (of_another_grid, "vm web"),
        (self_signed, "CN=me"),
    ],
)
async def test_a_vmid_is_what_the_grid_issued_to_a_vm(world: World, make: object, whose: str) -> None:
    untrusted: bytes = make()  # type: ignore[operator]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.create(vm_certificate=untrusted, vm_auth_token="")
    assert facts(error.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "VM_CERTIFICATE_INVALID")
    assert whose in str(error.value.details())
    definition = pb.VmDefinition(uuid=str(uuids.uuid4()), name="web", vm_certificate=untrusted, memory_mib=64, vcpus=1)
    async with world.orchestrator() as stub:
        call = stub.ExpectVm(pb.ExpectVmRequest(definition=definition), timeout=TIMEOUT)
        assert (await refusal(call))[1] == "VM_CERTIFICATE_INVALID"
        assert not (await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms


async def test_a_wrong_authority_of_the_grid_is_told_at_start(world: World) -> None:
    await world.stop()
    path = world.folder / "grid.pem"
    for content, why in ((b"x", "not an X.509"), (pem_of(certificate("web")), "of no CA"), (None, "cannot be read")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(SettingUnusable, match=f"'grid.authority': .*{why}"):
            await world.start()


@pytest.mark.parametrize("name", ["..", ".", "-rf", "_x", str(uuids.UUID(int=7)), uuids.UUID(int=7).hex, "é", "a\n"])
async def test_names_that_the_grid_or_a_command_could_not_use(world: World, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.create(name=name)
    assert facts(error.value)[1] == "REQUEST_INVALID"


async def test_while_the_hypervisor_is_away_what_is_on_file_is_listed() -> None:
    async with faulty_world() as (world, hypervisor):
        uuid = await world.create()
        hypervisor.fail("list")
        async with world.orchestrator() as stub:
            (found,) = (await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms
            assert (found.name, found.state) == ("web", pb.VM_STATE_UNKNOWN)
            hypervisor.fail("info")
            found = (await stub.GetVm(pb.GetVmRequest(uuid=uuid), timeout=TIMEOUT)).vm
            assert (found.uuid, found.state) == (uuid, pb.VM_STATE_UNKNOWN)
            hypervisor.heal()
            (found,) = (await stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)).vms
            assert found.state == pb.VM_STATE_STOPPED


async def test_callers_at_the_same_time_share_one_look_at_the_hypervisor() -> None:
    async with faulty_world() as (world, hypervisor):
        await world.create()
        looks, go = [], asyncio.Event()

        async def counted(uuids: object) -> object:
            looks.append(uuids)
            await go.wait()
            return await hypervisor._real.list(uuids)  # type: ignore[arg-type]

        hypervisor.list = counted  # type: ignore[attr-defined]
        async with world.orchestrator() as stub:
            calls = [asyncio.ensure_future(stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT)) for _ in range(20)]
            await asyncio.sleep(0.3)
            calls[0].cancel()
            go.set()
            answers = await asyncio.gather(*calls[1:])
        assert {len(answer.vms) for answer in answers} == {1}
        assert len(looks) == 1
