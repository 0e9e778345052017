"""Who gets through which door: refusals of unary and of streaming calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from uuid import uuid4

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dom0_middleware.api.errors import facts_of
from secfunet.identity import pem_of
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc, orchestrator_pb2
from tests.dom0_middleware.world import (
    NAME_OVERRIDE,
    TIMEOUT,
    Guest,
    World,
    eventually,
    facts,
    pem_key,
    request_for,
    sign_operation,
)

# A name that only the stubs' types have.
Stub = "agent_pb2_grpc.AgentServiceAsyncStub"


async def unary(stub: Stub) -> None:
    await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)


async def sign(stub: Stub) -> None:
    operation = sign_operation()
    await stub.Sign(agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT)


async def renew(stub: Stub) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = agent_pb2.RenewCertificateRequest(certificate_signing_request=request_for(key))
    await stub.RenewCertificate(request, timeout=TIMEOUT)


async def server_stream(stub: Stub) -> None:
    async for _ in stub.WatchIdentity(agent_pb2.WatchIdentityRequest(), timeout=TIMEOUT):
        return


async def both_streams(stub: Stub) -> None:
    call = stub.Operate(timeout=TIMEOUT)
    await call.write(agent_pb2.OperateRequest(batch_id=1, operations=[sign_operation()], timeout_ms=5000))
    async for _ in call:
        return
    await call.done_writing()


CALLS = [unary, sign, renew, server_stream, both_streams]
Call = Callable[["agent_pb2_grpc.AgentServiceAsyncStub"], Awaitable[None]]


async def refusal(guest: Guest, call: Call, address: str | None = None) -> tuple[grpc.StatusCode, str]:
    async with guest.agent(address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(stub)
    code, reason, _ = facts(error.value)
    return code, reason


@pytest.mark.parametrize("call", CALLS)
async def test_the_right_certificate_gets_through(world: World, call: Call) -> None:
    guest = await world.enrolled()
    async with guest.agent() as stub:
        await call(stub)


@pytest.mark.parametrize("call", CALLS)
async def test_another_domains_certificate_is_refused_and_recorded(world: World, call: Call) -> None:
    web, db = await world.enrolled("web"), await world.enrolled("db")
    assert await refusal(web, call, db.join["agent"]) == (grpc.StatusCode.PERMISSION_DENIED, "CERTIFICATE_FOREIGN")
    (record,) = [record for record in world.audit() if record.get("reason") == "CERTIFICATE_FOREIGN"]
    assert (record["vm"], record["decision"]) == (db.uuid, "refused")
    assert web.uuid in str(record["detail"])
    assert world.grid.executed == []


@pytest.mark.parametrize("call", CALLS)
async def test_an_expired_certificate_is_refused(world: World, call: Call) -> None:
    world.extra = {"limits": {"agent_certificate_lifetime": 2}}
    await world.stop()
    await world.start()
    guest = await world.enrolled()
    # TLS itself goes by the real clock; a connection that was opened before outlives the certificate.
    async with guest.agent() as stub:
        await unary(stub)
        world.clock_offset = 3.0
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(stub)
    assert facts(error.value)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_EXPIRED")


@pytest.mark.parametrize("call", CALLS)
async def test_a_certificate_of_an_earlier_run_is_refused(world: World, call: Call) -> None:
    first = await world.enrolled()
    async with world.orchestrator() as stub:
        await stub.StopVm(orchestrator_pb2.StopVmRequest(uuid=first.uuid, force=True), timeout=TIMEOUT)
    await world.boot(first.uuid)
    # As a copied image would do: the old key and certificate, at the new channel of the same domain.
    assert await refusal(first, call) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_NOT_CURRENT")


@pytest.mark.parametrize("call", CALLS)
async def test_an_invalid_policy_refuses_every_call(world: World, call: Call) -> None:
    guest = await world.enrolled()
    world.policy.write_text("[[rule]]\nnames = 5")
    world.service.reload()
    assert await refusal(guest, call) == (grpc.StatusCode.PERMISSION_DENIED, "POLICY_INVALID")
    world.policy.write_text('[[rule]]\nnames = ["web"]\noperations = ["sign"]\nschemes = ["*"]')
    world.service.reload()
    async with guest.agent() as stub:
        await call(stub)


async def test_an_invalid_policy_refuses_enrolment_too(world: World) -> None:
    guest = await world.boot(await world.create())
    world.policy.unlink()
    world.service.reload()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await guest.enrol()
    assert facts(error.value)[1] == "POLICY_INVALID"


@pytest.mark.parametrize("call", CALLS)
async def test_a_paused_domain_is_refused(world: World, call: Call) -> None:
    guest = await world.enrolled()
    world.hold_hypervisor().lookupByUUIDString(guest.uuid).suspend()
    await eventually(lambda: world.service.vms.guests()[0].phase.value == "paused")
    assert await refusal(guest, call) == (grpc.StatusCode.FAILED_PRECONDITION, "DOMAIN_NOT_RUNNING")


async def test_without_a_certificate_there_is_no_connection(world: World) -> None:
    guest = await world.enrolled()
    credentials = grpc.ssl_channel_credentials(guest.authority)
    async with grpc.aio.secure_channel(guest.join["agent"], credentials, NAME_OVERRIDE) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent_pb2_grpc.AgentServiceStub(channel).GetIdentity(agent_pb2.GetIdentityRequest(), timeout=3)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_plain_text_is_no_connection(world: World) -> None:
    guest = await world.enrolled()
    async with grpc.aio.insecure_channel(guest.join["agent"]) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await agent_pb2_grpc.AgentServiceStub(channel).GetIdentity(agent_pb2.GetIdentityRequest(), timeout=2)


async def test_a_certificate_of_the_same_name_by_another_authority_is_no_connection(world: World) -> None:
    from tests.dom0_middleware.world import certificate, rsa_key

    guest = await world.enrolled()
    credentials = grpc.ssl_channel_credentials(guest.authority, pem_key(rsa_key("web")), pem_of(certificate("web")))
    async with grpc.aio.secure_channel(guest.join["agent"], credentials, NAME_OVERRIDE) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent_pb2_grpc.AgentServiceStub(channel).GetIdentity(agent_pb2.GetIdentityRequest(), timeout=3)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_unary_calls_need_a_deadline(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as stub:
        operation = sign_operation()
        for call in (
            stub.GetIdentity(agent_pb2.GetIdentityRequest()),
            stub.Sign(agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign)),
            stub.Sign(agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=7200),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert facts(error.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "DEADLINE_REQUIRED")
    async with world.orchestrator() as orchestrator:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await orchestrator.ListVms(orchestrator_pb2.ListVmsRequest())
        assert facts(error.value)[1] == "DEADLINE_REQUIRED"
    assert world.grid.executed == []


async def test_renewal_keeps_the_stream_that_asked_and_ends_older_certificates(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as old:
        await unary(old)
        for _ in range(2):
            key = ec.generate_private_key(ec.SECP256R1())
            async with guest.agent() as stub:
                request = agent_pb2.RenewCertificateRequest(certificate_signing_request=request_for(key))
                renewed = await stub.RenewCertificate(request, timeout=TIMEOUT)
            guest.key, guest.certificate = key, renewed.certificate
            async with guest.agent() as stub:
                await unary(stub)
            if _ == 0:
                await unary(old)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(old)
    assert facts(error.value)[1] == "CERTIFICATE_NOT_CURRENT"


async def test_orchestrators_by_name(world: World) -> None:
    async with world.orchestrator("stranger") as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListVms(orchestrator_pb2.ListVmsRequest(), timeout=TIMEOUT)
        assert facts(error.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ORCHESTRATOR_NOT_ALLOWED")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in stub.WatchEvents(orchestrator_pb2.WatchEventsRequest()):
                pass
        assert facts(error.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ORCHESTRATOR_NOT_ALLOWED")
    assert any(str(record.get("detail")).startswith("it is 'stranger'") for record in world.audit())


async def test_a_guests_certificate_opens_no_orchestrators_door(world: World) -> None:
    guest = await world.enrolled()
    credentials = grpc.ssl_channel_credentials(
        (world.state / "orchestrator-authority.pem").read_bytes(), pem_key(guest.key), pem_of(guest.certificate)
    )
    address = f"unix:{world.state}/orchestrator.sock"
    from secfunet.middleware.v1 import orchestrator_pb2_grpc

    async with grpc.aio.secure_channel(address, credentials, NAME_OVERRIDE) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListVms(orchestrator_pb2.ListVmsRequest(), timeout=3)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_health_is_behind_the_same_guard(world: World) -> None:
    web, db = await world.enrolled("web"), await world.enrolled("db")
    request = health_pb2.HealthCheckRequest(service="secfunet.middleware.v1.AgentService")
    async with web.agent_channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(request, timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async for watched in stub.Watch(request, timeout=TIMEOUT):
            assert watched.status == health_pb2.HealthCheckResponse.SERVING
            break
    async with web.agent_channel(db.join["agent"]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT)
        assert facts(error.value)[1] == "CERTIFICATE_FOREIGN"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=TIMEOUT):
                pass
        assert facts(error.value)[1] == "CERTIFICATE_FOREIGN"


@pytest.mark.parametrize("wanted", [False, True])
async def test_reflection_is_off_unless_wanted(world: World, wanted: bool) -> None:
    if wanted:
        world.extra = {"reflection": True}
        await world.stop()
        await world.start()
    guest = await world.enrolled()

    async def requests() -> object:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with guest.agent_channel() as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests(), timeout=TIMEOUT)
        if wanted:
            names = [s.name async for answer in call for s in answer.list_services_response.service]
            assert "secfunet.middleware.v1.AgentService" in names
        else:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async for _ in call:
                    pass
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_beyond_the_bound_is_refused(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as stub:
        request = agent_pb2.RenewCertificateRequest(certificate_signing_request=b"\0" * 300_000)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.RenewCertificate(request, timeout=TIMEOUT)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_guests_id_is_never_recorded_as_one_of_our_making(world: World) -> None:
    """It may be the id of another VM's call, or anything: it stands in a member of its own, and the grid never hears of it."""
    web, db = await world.enrolled("web"), await world.enrolled("db")
    operation = sign_operation()
    async with web.agent() as stub:
        await stub.Sign(agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT)
    (stolen,) = (str(record["correlation"]) for record in world.audit() if record["action"] == "operation")
    for sent in (stolen, "deploy-42", "not an id!", "0" * 65):
        operation = sign_operation()
        async with db.agent() as stub:
            await stub.Sign(
                agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign),
                timeout=TIMEOUT,
                metadata=(("secfunet-correlation-id", sent),),
            )
    records = [record for record in world.audit() if record["action"] == "operation"]
    ids = [str(record["correlation"]) for record in records]
    assert len(set(ids)) == 5
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)
    assert [record.get("guest_correlation", "") for record in records] == ["", stolen, "deploy-42", "", ""]
    assert set(ids) <= set(world.grid.correlations)
    assert "deploy-42" not in world.grid.correlations


async def test_the_correlation_id_of_an_orchestrator_is_kept_if_it_is_one(world: World) -> None:
    async with world.orchestrator() as stub:
        for sent in ("0123456789abcdef", "deploy-42", "not an id!", "0" * 65):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.StopVm(
                    orchestrator_pb2.StopVmRequest(uuid=str(uuid4())),
                    timeout=TIMEOUT,
                    metadata=(("secfunet-correlation-id", sent),),
                )
    ids = [str(record["correlation"]) for record in world.audit() if record["action"] == "vm.stop"]
    assert ids[:4] == ["0123456789abcdef"] * 2 + ["deploy-42"] * 2
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in ids[4:])


def test_a_fault_tells_nothing() -> None:
    told = facts_of(RuntimeError("secret things"))
    assert told.code is grpc.StatusCode.INTERNAL
    assert "secret" not in told.message


async def test_the_guest_sees_no_other_guests_folder(world: World) -> None:
    web, db = await asyncio.gather(world.enrolled("web"), world.enrolled("db"))
    assert web.folder != db.folder
    assert web.folder.parent.stat().st_mode & 0o777 == 0o700
