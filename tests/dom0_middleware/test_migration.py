"""A VM goes from one host to another: what ends before, what begins after, and what a failure or a crash in the middle leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding

from dom0_middleware import vms
from dom0_middleware.errors import Reason, Refused
from dom0_middleware.hypervisor import DomainSpec
from secfunet.identity import thumbprint
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from tests.dom0_middleware.test_lifecycle import refusal
from tests.dom0_middleware.two_hosts import TwoHosts, home, signs, two_hosts
from tests.dom0_middleware.world import (
    NAME_OVERRIDE,
    TIMEOUT,
    World,
    certificate,
    eventually,
    facts,
    sign_operation,
    token,
)
from vm_agent.enrolment import Enrolment
from vm_agent.errors import AgentError


@pytest_asyncio.fixture
async def hosts() -> AsyncIterator[TwoHosts]:
    async with two_hosts() as made:
        yield made


async def test_a_vm_moves_and_works_again_without_being_restarted(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)
        expected = await b.expect(await a.definition(uuid))
        assert (expected.state, expected.authorised_until) == (pb.VM_STATE_AWAY, 0)
        assert uuid not in b.hypervisor.domains, "nothing is defined where it is expected"
        left_behind: list[object] = []

        def look() -> None:
            """What there is when the domain begins to move."""
            left_behind.extend(a.world.service.vms.guests())
            left_behind.extend(session for session in a.world.grid.sessions if not session.closed)
            left_behind.extend([] if a.channel.closed[-1] == (uuid, 3.0) else a.channel.closed)
            left_behind.extend(a.world.service._store.runs())

        a.hypervisor.on_migrate = look
        assert (await a.migrate(uuid, "b")).state == pb.VM_STATE_AWAY
        assert not left_behind
        # It runs over there, and gets nothing: there is no token for that hypervisor.
        await eventually(lambda: uuid in b.hypervisor.domains)
        here = await b.vm(uuid)
        assert (here.state, here.enrolled) == (pb.VM_STATE_RUNNING, False)
        assert not b.channel.opened
        assert not home(hosts.homes, uuid).exists()
        with pytest.raises(AgentError):
            await agent.operate(sign_operation(), timeout=0.5)
        # The token of the host that it comes from does not do.
        async with b.world.orchestrator() as stub:
            wrong = pb.StartVmRequest(uuid=uuid, vm_auth_token=a.token())
            assert (await refusal(stub.StartVm(wrong, timeout=TIMEOUT)))[1] == "TOKEN_INVALID"
        assert not b.channel.opened
        await b.start(uuid, b.token())
        assert await signs(agent, b)
        assert agent.identity.hvid == thumbprint(certificate("b"))
    assert (await b.vm(uuid)).enrolled
    assert (await a.vm(uuid)).authorised_until == 0, "the token for the first host is forgotten there"
    assert a.happened(uuid)[-1] == "vm.left"
    assert "vm.arrived" in b.happened(uuid)


async def test_a_token_may_be_there_before_the_domain_and_the_vm_may_come_back(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)
        await b.expect(await a.definition(uuid), b.token())
        await a.migrate(uuid, "b")
        assert await signs(agent, b)
        # The first host expects it by itself; told so, it takes a token.
        await a.expect(await b.definition(uuid), a.token())
        await b.migrate(uuid, "a")
        assert await signs(agent, a)
        await b.start(uuid, b.token())
        await a.migrate(uuid, "b")
        assert await signs(agent, b)
    # A VM that came is as any other of this host.
    assert (await b.stop(uuid)).state == pb.VM_STATE_STOPPED
    assert (await b.start(uuid)).state == pb.VM_STATE_RUNNING


async def test_a_failed_migration_leaves_the_vm_working(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)
        await b.expect(await a.definition(uuid), b.token())
        a.hypervisor.failure = Refused(Reason.LIBVIRT_REFUSED, "the network is down")
        async with a.world.orchestrator() as stub:
            request = pb.MigrateVmRequest(uuid=uuid, destination="b")
            with pytest.raises(grpc.aio.AioRpcError, match="goes on here") as error:
                await stub.MigrateVm(request, timeout=TIMEOUT)
        assert facts(error.value)[1] == "LIBVIRT_REFUSED"
        assert await signs(agent, a)
        # It may be tried again.
        await a.migrate(uuid, "b")
        assert await signs(agent, b)


async def test_destinations_are_those_of_the_settings(hosts: TwoHosts) -> None:
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent, hosts.a.world.orchestrator() as stub:
        assert await signs(agent, hosts.a)
        for destination in ("", "c", "xen+tls://b/system"):
            request = pb.MigrateVmRequest(uuid=uuid, destination=destination)
            assert await refusal(stub.MigrateVm(request, timeout=TIMEOUT)) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "DESTINATION_NOT_ALLOWED",
            )
        assert not [closed for closed in hosts.a.channel.closed if closed[1]], "nothing was ended for it"
        assert await signs(agent, hosts.a)


async def test_by_default_there_is_no_destination(world: World) -> None:
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        request = pb.MigrateVmRequest(uuid=guest.uuid, destination="b")
        assert (await refusal(stub.MigrateVm(request, timeout=TIMEOUT)))[1] == "DESTINATION_NOT_ALLOWED"


async def test_a_host_whose_channels_are_folders_sends_nothing(world: World) -> None:
    await world.stop()
    world.extra = {"destinations": {"b": "test:///default"}}
    await world.start()
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        request = pb.MigrateVmRequest(uuid=guest.uuid, destination="b")
        assert (await refusal(stub.MigrateVm(request, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
    assert world.service.vms.guests()


async def test_a_migration_behind_our_back_takes_the_key_and_brings_none(hosts: TwoHosts) -> None:
    """``virsh migrate`` by hand, to a host that was told nothing."""
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)
        await a.hypervisor.move(uuid, b.hypervisor.uri)
        await eventually(lambda: not a.world.service.vms.guests())
        await eventually(lambda: all(session.closed for session in a.world.grid.sessions))
        await eventually(lambda: a.world.service._store.vm(uuid).arriving)  # the run ends first
        assert (await a.vm(uuid)).state == pb.VM_STATE_AWAY
        assert not b.channel.opened
        with pytest.raises(AgentError):
            await agent.operate(sign_operation(), timeout=0.5)
        async with b.world.orchestrator() as stub:
            start = pb.StartVmRequest(uuid=uuid, vm_auth_token=b.token())
            assert (await refusal(stub.StartVm(start, timeout=TIMEOUT)))[1] == "VM_UNKNOWN"
    # The first host does not define it a second time: that would be the same VM twice.
    await a.world.stop()
    await a.world.start()
    assert uuid not in a.hypervisor.domains


async def test_a_vm_that_is_away_is_not_started_here(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    definition = await a.definition(uuid)
    await b.expect(definition)
    await a.migrate(uuid, "b")
    for host, vm_auth_token in ((a, ""), (a, a.token())):
        async with host.world.orchestrator() as stub:
            request = pb.StartVmRequest(uuid=uuid, vm_auth_token=vm_auth_token)
            if vm_auth_token:
                assert (await stub.StartVm(request, timeout=TIMEOUT)).vm.state == pb.VM_STATE_AWAY
            else:
                assert (await refusal(stub.StartVm(request, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
        assert uuid not in host.hypervisor.domains
    # Deleted where it is away, it lives on where it is; and its name is free.
    async with a.world.orchestrator() as stub:
        await stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT)
    assert uuid in b.hypervisor.domains
    await a.world.create("web", vm_auth_token="")


@pytest.mark.parametrize("what", ["vmid", "name", "uuid"])
async def test_another_domain_in_the_place_of_the_expected_one_gets_nothing(hosts: TwoHosts, what: str) -> None:
    """Whoever may use this host's libvirt sends a domain that resembles the one that is expected."""
    b = hosts.b
    uuid = await hosts.running()
    await b.expect(await hosts.a.definition(uuid), b.token())
    true = DomainSpec(uuid, "web", thumbprint(certificate("web")), 512, 1)
    forged = {
        "vmid": replace(true, vmid=thumbprint(certificate("db"))),
        "name": replace(true, name="web2"),
        "uuid": replace(true, uuid="00000000-0000-4000-8000-000000000001"),
    }[what]
    b.hypervisor.arrive(forged)
    await asyncio.sleep(0.1)
    assert not b.channel.opened
    assert not b.world.service.vms.guests()
    if what != "uuid":
        async with b.world.orchestrator() as stub:
            start = pb.StartVmRequest(uuid=uuid, vm_auth_token=b.token())
            await stub.StartVm(start, timeout=TIMEOUT)
            again = pb.ExpectVmRequest(definition=await hosts.a.definition(uuid))
            assert (await refusal(stub.ExpectVm(again, timeout=TIMEOUT)))[1] == "BINDING_MISMATCH"
        assert not b.channel.opened


async def test_what_cannot_be_expected(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    definition = await a.definition(uuid)

    def changed(**fields: object) -> pb.VmDefinition:
        other = pb.VmDefinition()
        other.CopyFrom(definition)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    b_own = await b.world.create("db", vm_auth_token=b.token("db"))
    await b.expect(definition)
    for asked, vm_auth_token, reason in (
        (changed(uuid="web"), "", "REQUEST_INVALID"),
        (changed(name="no name"), "", "REQUEST_INVALID"),
        (changed(vm_certificate=b"none"), "", "VM_CERTIFICATE_INVALID"),
        (changed(), token("db", hypervisor="b"), "TOKEN_INVALID"),
        (changed(), a.token(), "TOKEN_INVALID"),
        (changed(vm_certificate=certificate("b")), "", "VM_CERTIFICATE_INVALID"),
        (changed(vm_certificate=certificate("other")), "", "BINDING_MISMATCH"),
        (changed(uuid=b_own), "", "BINDING_MISMATCH"),
        (await b.definition(b_own), "", "VM_STATE_WRONG"),
        (changed(uuid="00000000-0000-4000-8000-000000000001"), "", "VM_EXISTS"),
    ):
        async with b.world.orchestrator() as stub:
            request = pb.ExpectVmRequest(definition=asked, vm_auth_token=vm_auth_token)
            assert (await refusal(stub.ExpectVm(request, timeout=TIMEOUT)))[1] == reason
    async with b.world.orchestrator("stranger") as stub:
        assert (await refusal(stub.ExpectVm(pb.ExpectVmRequest(definition=definition), timeout=TIMEOUT)))[1] == (
            "ORCHESTRATOR_NOT_ALLOWED"
        )
        assert (await refusal(stub.MigrateVm(pb.MigrateVmRequest(uuid=uuid, destination="a"), timeout=TIMEOUT)))[
            1
        ] == "ORCHESTRATOR_NOT_ALLOWED"


async def test_a_revoked_vm_does_not_leave_its_revocation_behind(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    await b.expect(await a.definition(uuid))
    async with a.world.orchestrator() as stub, b.world.orchestrator() as other:
        await stub.RevokeVm(pb.RevokeVmRequest(uuid=uuid), timeout=TIMEOUT)
        request = pb.MigrateVmRequest(uuid=uuid, destination="b")
        assert (await refusal(stub.MigrateVm(request, timeout=TIMEOUT)))[1] == "VM_REVOKED"
        # Revoked before it has come, it comes as one that is.
        await other.RevokeVm(pb.RevokeVmRequest(uuid=uuid), timeout=TIMEOUT)
        await a.hypervisor.move(uuid, b.hypervisor.uri)
        await asyncio.sleep(0.1)
        start = pb.StartVmRequest(uuid=uuid, vm_auth_token=b.token())
        assert (await refusal(other.StartVm(start, timeout=TIMEOUT)))[1] == "VM_REVOKED"
    assert not b.channel.opened


async def test_only_a_running_vm_moves(hosts: TwoHosts) -> None:
    uuid = await hosts.a.world.create("web", vm_auth_token=hosts.a.token())
    async with hosts.a.world.orchestrator() as stub:
        request = pb.MigrateVmRequest(uuid=uuid, destination="b")
        assert (await refusal(stub.MigrateVm(request, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
        await hosts.a.start(uuid)
        await hosts.a.hypervisor.suspend(uuid)
        assert (await refusal(stub.MigrateVm(request, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
    assert hosts.a.world.service.vms.guests()


async def test_a_migration_outlives_the_patience_of_its_caller(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    await b.expect(await a.definition(uuid), b.token())
    a.hypervisor.gate.clear()
    async with a.world.orchestrator() as stub:
        request = pb.MigrateVmRequest(uuid=uuid, destination="b")
        code, reason = await refusal(stub.MigrateVm(request, timeout=1.0))
        assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    a.hypervisor.gate.set()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, b)
    assert (await a.vm(uuid)).state == pb.VM_STATE_AWAY


async def test_a_vm_on_its_way_is_neither_started_nor_deleted_where_it_comes_to(hosts: TwoHosts) -> None:
    """There it looks like a stopped domain with the right binding."""
    a, b = hosts.a, hosts.b
    uuid = await in_the_middle(hosts)
    async with b.world.orchestrator() as stub:
        for call in (
            stub.StartVm(pb.StartVmRequest(uuid=uuid), timeout=TIMEOUT),
            stub.StartVm(pb.StartVmRequest(uuid=uuid, vm_auth_token=b.token()), timeout=TIMEOUT),
            stub.DeleteVm(pb.DeleteVmRequest(uuid=uuid), timeout=TIMEOUT),
        ):
            assert (await refusal(call))[1] == "VM_STATE_WRONG"
    await b.world.stop()
    await b.world.start()
    assert not b.channel.opened
    a.hypervisor.gate.set()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, b)


async def in_the_middle(hosts: TwoHosts) -> str:
    """A VM whose migration is under way; its UUID."""
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, hosts.a)
    await hosts.b.expect(await hosts.a.definition(uuid), hosts.b.token())
    hosts.a.hypervisor.gate.clear()
    task = asyncio.ensure_future(hosts.a.migrate(uuid, "b"))
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await eventually(lambda: hosts.a.hypervisor._moving)
    return uuid


@pytest.mark.parametrize("outcome", ["it left", "it failed", "it goes on"])
async def test_the_sources_daemon_ends_in_the_middle(
    hosts: TwoHosts, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "_CLOSE_TIMEOUT", 0.1)
    monkeypatch.setattr(vms, "_SETTLE_POLL", 0.05)
    a, b = hosts.a, hosts.b
    uuid = await in_the_middle(hosts)
    await a.world.stop()
    opened = len(a.channel.opened)
    if outcome == "it failed":
        a.hypervisor.failure = Refused(Reason.LIBVIRT_REFUSED, "no more memory there")
    if outcome != "it goes on":
        a.hypervisor.gate.set()
        await eventually(lambda: not a.hypervisor._moves)
    await a.world.start()
    if outcome == "it goes on":
        assert len(a.channel.opened) == opened, "no channel while it is on its way"
        async with a.world.orchestrator() as stub:
            start = pb.StartVmRequest(uuid=uuid, vm_auth_token=a.token())
            assert (await refusal(stub.StartVm(start, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
            again = pb.MigrateVmRequest(uuid=uuid, destination="b")
            assert (await refusal(stub.MigrateVm(again, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"
        a.hypervisor.gate.set()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a if outcome == "it failed" else b)
    if outcome != "it failed":
        assert (await a.vm(uuid)).state == pb.VM_STATE_AWAY
        assert uuid not in a.hypervisor.domains
        assert a.world.service._store.vm(uuid).vm_auth_token == ""


async def test_the_sources_dom0_ends_in_the_middle(hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vms, "_CLOSE_TIMEOUT", 0.1)
    a = hosts.a
    uuid = await in_the_middle(hosts)
    await a.world.stop()
    a.hypervisor.reboot()
    a.world.parts["boot_id"] = "second"
    await a.world.start()
    assert (await a.vm(uuid)).state == pb.VM_STATE_STOPPED
    assert (await a.start(uuid)).state == pb.VM_STATE_RUNNING
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)


async def test_the_sources_libvirt_ends_in_the_middle(hosts: TwoHosts) -> None:
    a = hosts.a
    uuid = await in_the_middle(hosts)
    a.hypervisor.failure = Refused(Reason.LIBVIRT_REFUSED, "connection reset")
    a.hypervisor.lose()
    a.hypervisor.gate.set()
    await eventually(lambda: not a.hypervisor._moves)
    assert not a.world.service.vms.guests()
    a.hypervisor.find_again()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)


async def test_a_vm_arrives_while_the_destinations_daemon_is_away(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    await b.expect(await a.definition(uuid), b.token())
    await b.world.stop()
    await a.migrate(uuid, "b")
    async with hosts.agent(uuid) as agent:
        await b.world.start()
        assert await signs(agent, b)
    # Nor does it matter when that daemon ends afterwards.
    await b.world.stop()
    await b.world.start()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, b)


async def test_an_enrolment_of_the_host_before_is_worth_nothing(hosts: TwoHosts) -> None:
    """Key and certificate that the agent had there, at the channel that the domain has here."""
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, hosts.a)
    kept = home(hosts.homes, uuid).parent / "state" / "enrolment.json"
    old = Enrolment.from_json(kept.read_bytes())
    await hosts.b.expect(await hosts.a.definition(uuid), hosts.b.token())
    await hosts.a.migrate(uuid, "b")
    await eventually(lambda: hosts.b.world.service.vms.guests())
    join = json.loads(home(hosts.homes, uuid).read_bytes())
    pem = old.certificate.public_bytes(Encoding.PEM)
    credentials = grpc.ssl_channel_credentials(join["guest_authority"].encode(), old.key.pem(), pem)
    async with grpc.aio.secure_channel(join["agent"], credentials, NAME_OVERRIDE) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await agent_pb2_grpc.AgentServiceStub(channel).GetIdentity(agent_pb2.GetIdentityRequest(), timeout=2)
    # Nor is it renewed there; and where it was issued its run is over, and nobody is invited.
    credentials = grpc.ssl_channel_credentials(join["guest_authority"].encode())
    async with grpc.aio.secure_channel(join["enrol"], credentials, NAME_OVERRIDE) as channel:
        request = agent_pb2.RenewEndedRequest(
            public_key=old.key.public_der(), certificate_signing_request=old.key.signing_request()
        )
        answer = agent_pb2_grpc.EnrolmentServiceStub(channel).RenewEnded(request, timeout=TIMEOUT)
        assert (await refusal(answer))[1] == "CERTIFICATE_NOT_CURRENT"
    async with hosts.a.world.orchestrator() as stub:
        again = pb.InviteVmRequest(uuid=uuid, vm_auth_token=hosts.a.token())
        assert (await refusal(stub.InviteVm(again, timeout=TIMEOUT)))[1] == "VM_STATE_WRONG"


async def test_what_waits_in_the_agent_moves_with_it(hosts: TwoHosts) -> None:
    """Twenty operations are under way, or come while the VM moves: each is done, by the host that it comes to if need be."""
    a, b = hosts.a, hosts.b
    uuid = await hosts.running()
    async with hosts.agent(uuid) as agent:
        assert await signs(agent, a)
        await b.expect(await a.definition(uuid), b.token())
        a.world.grid.gate.clear()
        waiting = [asyncio.create_task(agent.operate(sign_operation(), timeout=60)) for _ in range(10)]
        await eventually(lambda: len(a.world.grid.executed) > 1)
        a.hypervisor.on_migrate = lambda: waiting.extend(
            asyncio.create_task(agent.operate(sign_operation(), timeout=60)) for _ in range(10)
        )
        await a.migrate(uuid, "b")
        outputs = await asyncio.gather(*waiting, return_exceptions=True)
        assert len(outputs) == 20
        assert [output for output in outputs if not isinstance(output, bytes)] == []
