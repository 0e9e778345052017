"""What an orchestrator sees of an agent: whether it is there, since when; and of a token that comes to its end."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest

from dom0_middleware.presence import BLINK, Presence
from dom0_middleware.tokens import ends_soon
from secfunet.middleware.v1 import agent_pb2, orchestrator_pb2
from tests.dom0_middleware.world import TIMEOUT, Guest, World, token


async def seen(world: World, uuid: str) -> orchestrator_pb2.Vm:
    async with world.orchestrator() as stub:
        one = (await stub.GetVm(orchestrator_pb2.GetVmRequest(uuid=uuid), timeout=TIMEOUT)).vm
        (listed,) = (await stub.ListVms(orchestrator_pb2.ListVmsRequest(), timeout=TIMEOUT)).vms
    assert one == listed
    return one


async def until(world: World, guest: Guest, *, connected: bool) -> orchestrator_pb2.Vm:
    end = asyncio.get_running_loop().time() + 10
    while (vm := await seen(world, guest.uuid)).agent_connected is not connected:
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.02)
    return vm


async def test_an_agent_that_stops_is_seen_to_be_away(world: World) -> None:
    guest = await world.enrolled()
    vm = await seen(world, guest.uuid)
    assert vm.enrolled
    assert not vm.agent_connected
    begin = int(time.time())
    async with guest.agent() as stub:
        watch = stub.WatchIdentity(agent_pb2.WatchIdentityRequest())
        assert await watch.read() is not grpc.aio.EOF
        assert begin <= (await until(world, guest, connected=True)).agent_since <= time.time()
    vm = await until(world, guest, connected=False)
    assert vm.enrolled
    assert begin <= vm.agent_since <= time.time()


async def test_after_a_restart_of_the_daemon_nobody_is_connected_until_it_is(world: World) -> None:
    world.hold_hypervisor()
    guest = await world.enrolled()
    async with guest.agent() as stub:
        assert await stub.WatchIdentity(agent_pb2.WatchIdentityRequest()).read() is not grpc.aio.EOF
        await until(world, guest, connected=True)
        await world.stop()
    await world.start()
    vm = await seen(world, guest.uuid)
    assert vm.enrolled
    assert not vm.agent_connected
    assert abs(vm.agent_since - time.time()) < 10


async def test_of_a_stopped_vm_there_is_nothing_to_say(world: World) -> None:
    vm = await seen(world, await world.create())
    assert (vm.agent_connected, vm.agent_since, vm.channel_refused) == (False, 0, "")


def test_a_moment_without_a_connection_is_no_absence() -> None:
    now = 100.0
    presence = Presence(lambda: now)
    with presence.stream():
        assert (presence.connected, presence.since) == (True, 100.0)
        now = 150.0
        with presence.stream():
            pass
        assert (presence.connected, presence.since) == (True, 100.0)
    assert (presence.connected, presence.since) == (False, 150.0)
    now += BLINK / 2
    with presence.stream():
        assert (presence.connected, presence.since) == (True, 100.0)
        now = 200.0
    now += BLINK * 2
    with presence.stream():
        assert (presence.connected, presence.since) == (True, 200.0 + BLINK * 2)


async def test_a_token_that_comes_to_its_end_is_seen_and_said_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    uuid = await world.create(vm_auth_token=token("web", valid=9000))
    world.service._tokens.look()
    assert not (await seen(world, uuid)).token_ends_soon
    world.clock_offset = 7000.0
    assert (await seen(world, uuid)).token_ends_soon
    for _ in range(3):
        world.service._tokens.look()
    assert [record.message for record in caplog.records if "VM-Auth-Token of a VM" in record.message] == [
        "the VM-Auth-Token of a VM expires soon: give it a new one ('secure-middleware vm start --token-file')"
    ]
    registry = world.service.metrics.registry
    assert registry.get_sample_value("secfunet_middleware_tokens_ending") == 1
    assert abs((registry.get_sample_value("secfunet_middleware_next_token_end_seconds") or 0) - time.time() - 9000) < 60
    async with world.orchestrator() as stub:
        await stub.StartVm(
            orchestrator_pb2.StartVmRequest(uuid=uuid, vm_auth_token=token("web", valid=90_000)), timeout=TIMEOUT
        )
    assert not (await seen(world, uuid)).token_ends_soon
    world.service._tokens.look()
    assert registry.get_sample_value("secfunet_middleware_tokens_ending") == 0


def test_when_a_token_ends_soon() -> None:
    now = time.time()
    assert not ends_soon("", now)
    assert ends_soon("nonsense", now)
    assert ends_soon(token("web", valid=-5), now)
    assert ends_soon(token("web", valid=60), now)
    assert not ends_soon(token("web", valid=3600), now)
    assert not ends_soon(token("web", valid=8 * 86400), now), "a week is long enough"
