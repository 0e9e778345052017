"""A grid whose cards are partly on another host: through the whole chain, and what becomes of it when the node goes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from gose.authority import CardAccess
from gose.authority.binding import bind
from gose.authority.ledger import unrecorded
from gose.cards import CardWays
from gose.overview import CardState, take_overview
from gose.overview.text import as_text
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.container import ContainerError, ContainerProfile, unwrap_content_key, verify_container
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import Role, load_certificate, rsa_key_of
from secfunet.operation import check_result, parse_result_set
from secfunet.racs.commands import PowerOn
from tests.gose.grid import sign_operation
from tests.gose.test_operations import check_signature, execute, reason_of, under, until_back
from tests.gose_racs.node import refusals, settle, talking, user
from tests.gose_racs.remote import RemoteGrid, new_remote_grid

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS = {"card_backoff_max": 0.3, "card_connect_timeout": 1.0, "operation_timeout": 2.0, "watchdog_interval": 0.5}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(short_folder: Path) -> AsyncIterator[RemoteGrid]:
    """vm-1's card is the grid's own; vm-b's is on the node, and so is the only card that serves the login page."""
    async with new_remote_grid(short_folder, {"vm-b": "vm", "web-b": "server"}, servers=0) as world:
        world.grid.hypervisor("hv-a")
        yield world


async def signed(world: RemoteGrid, stub: Any, vm: str, session: dict[str, Any], *, timeout: float = 10) -> float:
    """One signature, checked; how long it took."""
    operation = sign_operation()
    began = time.monotonic()
    answer = await stub.Execute(execute(operation), timeout=timeout, metadata=under(session))
    check(world, vm, operation, answer)
    return time.monotonic() - began


def check(world: RemoteGrid, vm: str, operation: operation_pb2.Operation, answer: Any) -> None:
    grid = world.grid
    results = grid.open("hv-a", answer.containers[0])
    vmid, hvid = grid.vms[vm].thumbprint, grid.hypervisor("hv-a").hvid
    output = check_result(results, operation=operation, vmid=vmid, hvid=hvid, now=time.time())
    check_signature(grid, vm, operation.sign.digest, output)


async def test_through_the_whole_chain(world: RemoteGrid) -> None:
    async with world.node_running() as node, world.grid.running(**LIMITS):
        # The login page is served by a card of the node, the key used is in another one.
        sessions = {vm: await world.grid.session(vm, "hv-a") for vm in ("vm-1", "vm-b")}
        async with world.grid.channel("hv-a") as channel:
            stub = world.grid.stub(channel)
            for vm, session in sessions.items():
                await signed(world, stub, vm, session)
            operations = [sign_operation() for _ in range(40)]
            answer = await stub.Execute(execute(*operations), timeout=20, metadata=under(sessions["vm-b"]))
            assert not answer.failures
            for operation in operations:
                check(world, "vm-b", operation, answer)
        assert {seid: card.is_in_use for seid, card in node.cards.items()} == {"vm-b": True, "web-b": True}
    assert refusals(node) == {}


async def test_status_says_where_a_card_is(world: RemoteGrid) -> None:
    grid = world.grid
    with grid.registry() as registry:
        gone = await take_overview(grid.settings, grid.authority, registry, now=time.time())
        async with world.node_running():
            there = await take_overview(grid.settings, grid.authority, registry, now=time.time())
            async with grid.running(**LIMITS):
                running = await take_overview(grid.settings, grid.authority, registry, now=time.time())
    place = f"racs://{world.address}/vm-b"
    for overview, state in ((gone, CardState.GONE), (there, CardState.ANSWERS), (running, CardState.IN_SERVICE)):
        (card,) = [card for card in overview.cards if card.element.seid == "far-vm-b"]
        assert (card.element.place, card.state) == (place, state)
        assert place in as_text(overview)


async def test_a_command_that_the_node_refuses_costs_the_operation_only(world: RemoteGrid) -> None:
    users = [
        {
            "name": "grid-a",
            "grants": [
                {"secure_elements": ["vm-b"], "allow": ["operate"], "deny": ["802A8000/FFFFFF00"]},
                {"secure_elements": ["web-b"], "allow": ["tls"]},
            ],
        }
    ]
    async with world.node_running(users=users), world.grid.running(**LIMITS) as service:
        session = await world.grid.session("vm-b", "hv-a")
        decrypt = operation_pb2.Operation(
            request_id=bytes(16),
            decrypt=operation_pb2.DecryptOperation(
                scheme=operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256, ciphertext=bytes(256)
            ),
        )
        async with world.grid.channel("hv-a") as channel:
            stub = world.grid.stub(channel)
            operation = sign_operation()
            answer = await stub.Execute(execute(decrypt, operation), timeout=10, metadata=under(session))
            check(world, "vm-b", operation, answer)
            (failure,) = answer.failures
            assert failure.request_id == decrypt.request_id
            assert failure.reason == "CARD_REFUSED"
            await signed(world, stub, "vm-b", session)
        (slot,) = [slot for slot in service.rack.slots() if slot.seid == "far-vm-b"]
        assert slot.jobs_done == 2


async def test_a_card_of_a_node_is_bound_to_a_hypervisor(world: RemoteGrid) -> None:
    """Binding is administered through the node, and the card's own containers come through it: neither it nor the grid can open them."""
    grid = world.grid
    element, vm = grid.settings.secure_element("far-vm-b"), grid.vms["vm-b"]
    assert element is not None
    assert element.administrator_keys_file is not None
    ways, keys = CardWays.of(grid.settings), AdministratorKeys.read(element.administrator_keys_file)
    access = CardAccess.through(lambda: ways.connect(element, timeout=5), keys, where=element.place)

    async def bound_to(name: str | None) -> None:
        with grid.registry() as registry:
            hypervisor = None if name is None else registry.named(Role.HYPERVISOR, name)
            profile = ContainerProfile.OAEP_PSS_SHA256
            await bind(vm, hypervisor, "vm", access, registry, profile=profile, now=time.time(), record=unrecorded)

    both = [user("grid-a", "vm-b", "web-b", allow=["personalise", "operate", "tls"])]
    async with world.node_running(users=both):
        await bound_to("hv-a")
        async with grid.running(**LIMITS), grid.channel("hv-a") as channel:
            session = await grid.session("vm-b", "hv-a")
            operation = sign_operation()
            answer = await grid.stub(channel).Execute(execute(operation), timeout=10, metadata=under(session))
        (container,) = answer.containers
        with pytest.raises(ContainerError):
            grid.open("hv-a", container)  # not the container authority's
        hypervisor = grid.hypervisor("hv-a")
        verified = verify_container(container, rsa_key_of(load_certificate(vm.certificate)), 256)
        results = parse_result_set(verified.open(unwrap_content_key(hypervisor.key, verified.header)))
        ids = {"vmid": vm.thumbprint, "hvid": hypervisor.hvid}
        output = check_result(results, operation=operation, now=time.time(), **ids)
        check_signature(grid, "vm-b", operation.sign.digest, output)
        await bound_to(None)


async def test_a_node_that_is_restarted(world: RemoteGrid) -> None:
    async with world.grid.running(**LIMITS) as service:
        slots = {slot.seid: slot for slot in service.rack.slots()}
        assert slots["far-vm-b"].state.value == "out_of_service"
        assert "cannot be reached" in slots["far-vm-b"].cause
        async with world.node_running():
            await settle(lambda: slots["far-vm-b"].state.value == slots["far-web-b"].state.value == "in_service")
            sessions = {vm: await world.grid.session(vm, "hv-a") for vm in ("vm-1", "vm-b")}
        async with world.grid.channel("hv-a") as channel:
            stub = world.grid.stub(channel)
            await signed(world, stub, "vm-1", sessions["vm-1"])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await signed(world, stub, "vm-b", sessions["vm-b"])
            assert reason_of(caught.value) == "CARD_UNAVAILABLE"
            async with world.node_running():
                operation = sign_operation()
                check(world, "vm-b", operation, await until_back(stub, sessions["vm-b"], operation))


async def test_a_card_that_hangs_on_the_node(world: RemoteGrid) -> None:
    card = world.node.cards["vm-b"].process
    assert card is not None
    async with world.node_running(), world.grid.running(**LIMITS):
        sessions = {vm: await world.grid.session(vm, "hv-a") for vm in ("vm-1", "vm-b")}
        async with world.grid.channel("hv-a") as channel:
            stub = world.grid.stub(channel)
            card.send_signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                hanging = asyncio.create_task(signed(world, stub, "vm-b", sessions["vm-b"]))
                for _ in range(10):
                    assert await signed(world, stub, "vm-1", sessions["vm-1"]) < LIMITS["operation_timeout"]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await hanging
                assert reason_of(caught.value) == "CARD_UNAVAILABLE"
                assert time.monotonic() - began < LIMITS["operation_timeout"] + 3
            finally:
                card.send_signal(signal.SIGCONT)
            operation = sign_operation()
            check(world, "vm-b", operation, await until_back(stub, sessions["vm-b"], operation))


async def test_a_card_that_somebody_else_has(world: RemoteGrid) -> None:
    users = [*world.users, {"name": "other", "grants": [{"secure_elements": ["vm-b"], "allow": ["operate"]}]}]
    async with world.node_running(users=users) as node, talking(node, world.node.context("other")) as other:
        assert await other.code(PowerOn("vm-b")) == 8
        async with world.grid.running(**LIMITS) as service:
            (slot,) = [slot for slot in service.rack.slots() if slot.seid == "far-vm-b"]
            await settle(lambda: "serves another client" in slot.cause)
            other.writer.transport.abort()
            await settle(lambda: slot.state.value == "in_service")


async def test_a_grid_that_the_node_does_not_know(world: RemoteGrid) -> None:
    async with world.node_running(users=[]), world.grid.running(**LIMITS) as service:
        causes = {slot.seid: slot.cause for slot in service.rack.slots()}
        assert "was lost" in causes["far-vm-b"]
    users = [{"name": "grid-a", "grants": [{"secure_elements": ["web-b"], "allow": ["tls"]}]}]
    async with world.node_running(users=users), world.grid.running(**LIMITS) as service:
        causes = {slot.seid: slot.cause for slot in service.rack.slots()}
        assert "-608" in causes["far-vm-b"]
