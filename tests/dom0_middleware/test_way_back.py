"""A way back for the identity of a running domain: renewal after the certificate's end, and a new invitation."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dom0_middleware.enrolment import MAX_ATTEMPTS
from dom0_middleware.guest import MAX_LATENESS
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc, orchestrator_pb2
from secfunet.vm_auth_token import unverified_expiry
from tests.dom0_middleware.costly_requests import request_with_exponent
from tests.dom0_middleware.world import TIMEOUT, Guest, World, eventually, facts, running_world, sign_operation, token

LIFETIME = 3600.0


@pytest_asyncio.fixture
async def brief_world() -> AsyncIterator[World]:
    """Certificates live for three seconds: what TLS makes of their end is seen, too, and its clock is the machine's."""
    async with running_world(limits={"agent_certificate_lifetime": 3}) as made:
        yield made


async def ended(guest: Guest) -> None:
    end = x509.load_der_x509_certificate(guest.certificate).not_valid_after_utc.timestamp()
    await asyncio.sleep(max(end - time.time(), 0) + 1.1)


async def signs(guest: Guest) -> bool:
    operation = sign_operation()
    async with guest.agent() as stub:
        try:
            await stub.Sign(
                agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT
            )
        except grpc.aio.AioRpcError:
            return False
    return True


async def not_renewed(guest: Guest, **how: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await guest.renew_ended(**how)  # type: ignore[arg-type]
    return facts(error.value)[1]


async def invite(world: World, uuid: str, vm_auth_token: str = "") -> Guest:
    async with world.orchestrator() as stub:
        await stub.InviteVm(orchestrator_pb2.InviteVmRequest(uuid=uuid, vm_auth_token=vm_auth_token), timeout=TIMEOUT)
    folder = world.state / "guests" / uuid
    return Guest(folder, uuid, json.loads((folder / "join.json").read_text()))


async def invite_refused(world: World, uuid: str, vm_auth_token: str = "") -> str:
    async with world.orchestrator() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.InviteVm(
                orchestrator_pb2.InviteVmRequest(uuid=uuid, vm_auth_token=vm_auth_token), timeout=TIMEOUT
            )
    return facts(error.value)[1]


async def test_a_certificate_that_has_ended_is_renewed_for_its_key(brief_world: World) -> None:
    world, guest = brief_world, await brief_world.enrolled()
    await ended(guest)
    await guest.renew_ended()
    assert await signs(guest)
    assert [record["action"] for record in world.audit() if record["decision"] == "permitted"][-2:] == [
        "renew",
        "operation",
    ]


async def test_it_is_renewed_after_a_restart_of_the_daemon(brief_world: World) -> None:
    world = brief_world
    world.hold_hypervisor()
    guest = await world.enrolled()
    await world.stop()
    await ended(guest)
    await world.start()
    await guest.renew_ended()
    assert await signs(guest)


@pytest.mark.parametrize("moment", ["before its end", "a day after its end"])
async def test_when_it_is_renewed(world: World, moment: str) -> None:
    """A guest whose clock is ahead believes that it has ended: that does no harm. A day later the agent is not known any more."""
    guest = await world.enrolled()
    if moment == "before its end":
        await guest.renew_ended()
        assert await signs(guest)
    else:
        world.clock_offset = LIFETIME + MAX_LATENESS - 60
        await guest.renew_ended()
        world.clock_offset += LIFETIME + MAX_LATENESS + 60
        assert await not_renewed(guest) == "CERTIFICATE_EXPIRED"
        guest = await invite(world, guest.uuid, token("web", valid=3 * MAX_LATENESS))
        await guest.enrol()


async def test_another_key_is_refused_before_anything_is_computed_with_it(world: World) -> None:
    guest = await world.enrolled()
    world.clock_offset = LIFETIME + 10
    other = ec.generate_private_key(ec.SECP256R1())
    assert await not_renewed(guest, key=other) == "CERTIFICATE_NOT_CURRENT"
    # It names the known key, and its request is for another.
    known = guest.key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert await not_renewed(guest, key=other, public_key=known) == "CERTIFICATE_NOT_CURRENT"
    for size in (0, 1, 10_000):
        assert await not_renewed(guest, public_key=b"x" * size) == "CERTIFICATE_NOT_CURRENT"
    await guest.renew_ended()


async def test_another_domains_channel_renews_nothing(world: World) -> None:
    guest, other = await world.enrolled("web"), await world.enrolled("db")
    world.clock_offset = LIFETIME + 10
    guest.join = other.join
    assert await not_renewed(guest) == "CERTIFICATE_NOT_CURRENT"


async def test_before_the_first_certificate_there_is_nothing_to_renew(world: World) -> None:
    guest = await world.boot(await world.create())
    assert await not_renewed(guest) == "CERTIFICATE_NOT_CURRENT"


async def test_nothing_is_renewed_after_a_revocation_or_another_run(world: World) -> None:
    guest = await world.enrolled()
    async with world.orchestrator() as stub:
        await stub.StopVm(orchestrator_pb2.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
        with pytest.raises(grpc.aio.AioRpcError):
            await guest.renew_ended()
        again = await world.boot(guest.uuid)
        assert again.join["enrol"] == guest.join["enrol"]
        assert await not_renewed(guest) == "CERTIFICATE_NOT_CURRENT"
        await again.enrol()
        await again.renew_ended()
        assert await not_renewed(guest) == "CERTIFICATE_NOT_CURRENT"
        await stub.RevokeVm(orchestrator_pb2.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
    assert await not_renewed(again) == "VM_REVOKED"


async def test_a_domain_that_was_restored_renews_nothing(world: World) -> None:
    """Its disk and memory hold the agent's key, but it is another domain of the same UUID."""
    direct = world.hold_hypervisor()
    guest = await world.enrolled()
    domain = direct.lookupByUUIDString(guest.uuid)
    saved = world.folder / "saved"
    domain.save(str(saved))
    await eventually(lambda: not world.service.vms.guests())
    direct.restore(str(saved))
    with pytest.raises(grpc.aio.AioRpcError):
        await guest.renew_ended()


async def test_renewals_have_a_rate(world: World) -> None:
    guest = await world.enrolled()
    reasons = []
    for _ in range(22):
        try:
            await guest.renew_ended()
        except grpc.aio.AioRpcError as error:
            reasons.append(facts(error)[1])
    assert set(reasons) == {"RATE_LIMITED"}


async def test_unsound_requests_count_as_attempts(world: World) -> None:
    guest = await world.boot(await world.create())
    costly = request_with_exponent(2048, 2047)
    seen = []
    async with guest.enrol_channel() as channel:
        stub = agent_pb2_grpc.EnrolmentServiceStub(channel)
        for _ in range(MAX_ATTEMPTS + 1):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Enrol(
                    agent_pb2.EnrolRequest(join_secret=guest.secret, certificate_signing_request=costly),
                    timeout=TIMEOUT,
                )
            seen.append(facts(error.value)[1])
    assert seen == ["CSR_INVALID"] * MAX_ATTEMPTS + ["JOIN_SECRET_REFUSED"]


async def test_an_invitation_gives_a_running_domain_a_new_certificate_and_ends_the_old_one(world: World) -> None:
    old = await world.enrolled()
    assert await signs(old)
    new = await invite(world, old.uuid)
    assert new.secret != old.secret
    assert not await signs(old)
    assert await not_renewed(old) == "CERTIFICATE_NOT_CURRENT"
    await new.enrol()
    assert await signs(new)
    assert not await signs(old)
    assert [record["caller"] for record in world.audit() if record["action"] == "vm.invite"] == ["admin"]


async def test_an_invitation_needs_a_token_that_has_not_ended(world: World) -> None:
    old = await world.enrolled(vm_auth_token=token("web", valid=3))
    await eventually(lambda: unverified_expiry(world.service.vms.guests()[0].record.vm_auth_token) <= time.time())
    assert await invite_refused(world, old.uuid) == "TOKEN_EXPIRED"
    assert await invite_refused(world, old.uuid, token("db")) == "TOKEN_INVALID"
    assert await invite_refused(world, old.uuid, "nonsense") == "TOKEN_INVALID"
    new = await invite(world, old.uuid, token("web"))
    await new.enrol()
    assert await signs(new)


async def test_who_may_not_be_invited(world: World) -> None:
    stopped = await world.create()
    assert await invite_refused(world, stopped) == "VM_STATE_WRONG"
    without = await world.create("db", vm_auth_token="")
    assert await invite_refused(world, without) == "TOKEN_MISSING"
    guest = await world.boot(stopped)
    async with world.orchestrator() as stub:
        await stub.RevokeVm(orchestrator_pb2.RevokeVmRequest(uuid=stopped), timeout=TIMEOUT)
    assert await invite_refused(world, stopped) == "VM_REVOKED"
    assert await invite_refused(world, "00000000-0000-0000-0000-000000000000") == "VM_UNKNOWN"
    assert not await signs_with_nothing(guest)


async def signs_with_nothing(guest: Guest) -> bool:
    try:
        await guest.enrol()
    except grpc.aio.AioRpcError:
        return False
    return True
