"""``secure-middleware status`` and ``check``: exit 0 only when an operation would work now."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from dom0_middleware.errors import SettingUnusable
from dom0_middleware.start_checks import require_right
from gose_client.errors import GridRefusedError
from gose_client.trial import Link, LinkState
from secfunet.middleware.v1 import agent_pb2
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from tests.dom0_middleware.test_cli import run, settings_of
from tests.dom0_middleware.world import TIMEOUT, World, facts, token


async def status(world: World) -> pb.GetStatusResponse:
    await asyncio.sleep(1.05)  # an answer stands for a second
    async with world.orchestrator() as stub:
        return await stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT)


def broken(found: pb.GetStatusResponse) -> list[tuple[str, int, str]]:
    """Besides the hypervisor's certificate, which lasts a day in these tests, and so is always near its end."""
    assert {link.state for link in found.links if link.name == "certificate"} == {pb.LINK_STATE_WARNING}
    others = [link for link in found.links if link.name != "certificate"]
    return [(link.name, link.state, link.vm) for link in others if link.state != pb.LINK_STATE_OK]


async def test_each_link_that_breaks_is_named(world: World) -> None:
    await world.enrolled()
    found = await status(world)
    assert (found.works, broken(found)) == (True, [])
    assert {link.name for link in found.links} >= {"libvirt", "card", "login", "audit", "state", "policy", "vm"}
    whole = world.grid.links
    world.grid.links = (Link("card", LinkState.OK), Link("operations", LinkState.AWAY, "cannot be reached"))
    assert broken(await status(world)) == [("operations", pb.LINK_STATE_AWAY, "")]
    world.grid.links = whole
    world.policy.write_text("broken")
    world.service.policy.reload()
    found = await status(world)
    assert (found.works, broken(found)) == (False, [("policy", pb.LINK_STATE_WRONG, "")])


async def test_a_vms_token_that_ends(world: World) -> None:
    guest = await world.enrolled(vm_auth_token=token("web", valid=7200))
    assert (await status(world)).works
    world.clock_offset = 4000
    found = await status(world)
    assert (found.works, broken(found)) == (True, [("vm", pb.LINK_STATE_WARNING, "web")])
    world.clock_offset = 7201
    found = await status(world)
    assert (found.works, broken(found)) == (False, [("vm", pb.LINK_STATE_REFUSED, "web")])
    async with world.orchestrator() as stub:
        await stub.RevokeVm(pb.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
    assert broken(await status(world)) == [("vm", pb.LINK_STATE_WARNING, "web")]


async def test_callers_in_a_second_share_one_look(world: World) -> None:
    looks = 0
    look = world.grid.look

    async def counted(*, timeout: float) -> tuple[Link, ...]:
        nonlocal looks
        looks += 1
        return await look(timeout=timeout)

    world.grid.look = counted  # type: ignore[method-assign]
    async with world.orchestrator() as stub:
        await asyncio.gather(*(stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT) for _ in range(20)))
    assert looks == 1


async def test_the_command_says_so_with_its_exit_code(world: World) -> None:
    config = settings_of(world)
    code, out, _ = await run("status", "--config", config)
    assert (code, out.splitlines()[-1]) == (0, "an operation would work now")
    world.grid.links = (Link("card", LinkState.AWAY, "the card is gone"),)
    await asyncio.sleep(1.05)
    code, out, _ = await run("status", "--json", "--config", config)
    said = json.loads(out)
    assert (code, said["works"]) == (69, False)
    assert {"link": "card", "state": "away", "message": "the card is gone"} in said["links"]
    await world.create()
    await asyncio.sleep(1.05)
    code, _, err = await run("vm", "start", "web", "--config", config)
    assert (code, "the VM cannot use its key now: card: the card is gone" in err) == (0, True)
    await world.stop()
    assert (await run("status", "--config", config))[0] == 69


async def test_what_is_wrong_keeps_the_daemon_from_starting_and_what_is_away_does_not(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    require_right(
        [Link("operations", LinkState.AWAY, "not now"), Link("login", LinkState.REFUSED, "no")], world.settings
    )
    assert [record.link for record in caplog.records] == ["operations", "login"]  # type: ignore[attr-defined]
    for setting, key in (("grid.authority", "grid.authority"), ("card", "card.user_pin_file")):
        with pytest.raises(SettingUnusable, match=f"'{key}': why"):
            require_right([Link("x", LinkState.WRONG, "why", setting)], world.settings)


@pytest.mark.e2e
async def test_check_names_what_is_wrong(world: World, tmp_path: Path) -> None:
    config = settings_of(world)
    await world.stop()
    (world.folder / "p").write_text("1234")
    (world.folder / "p").chmod(0o600)
    code, out, _ = await run("check", "--config", config)
    assert (code, "wrong" in out, "'grid.authority'" in out) == (78, True, True)
    (world.folder / "g.pem").write_bytes((world.folder / "grid.pem").read_bytes())
    code, out, _ = await run("check", "--config", config)
    assert (code, "wrong" in out) == (69, False)  # no card and no grid, which may come
    (world.folder / "p").chmod(0o644)
    code, out, _ = await run("check", "--json", "--config", config)
    wrong = [link for link in json.loads(out)["links"] if link["state"] == "wrong"]
    assert (code, [link["link"] for link in wrong]) == (78, ["card"])
    assert "'card.user_pin_file'" in wrong[0]["message"]
    world.policy.write_text("broken")
    (world.state / "guest-authority.key").unlink()
    _, out, _ = await run("check", "--json", "--config", config)
    wrong = [link for link in json.loads(out)["links"] if link["state"] == "wrong"]
    assert [link["link"] for link in wrong] == ["state", "policy", "card"]


async def test_a_guest_learns_whether_an_operation_would_work(world: World) -> None:
    guest = await world.enrolled()
    async with guest.agent() as agent:
        answers = await asyncio.gather(*(agent.Probe(agent_pb2.ProbeRequest(), timeout=TIMEOUT) for _ in range(20)))
        assert all(abs(answer.time - time.time()) < 30 for answer in answers)
        assert world.grid.probes == 1
        world.grid.broken = GridRefusedError("CARD_UNAVAILABLE", "out of service", code=grpc.StatusCode.UNAVAILABLE)
        await asyncio.sleep(1.05)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await agent.Probe(agent_pb2.ProbeRequest(), timeout=TIMEOUT)
            assert facts(error.value)[1] == "CARD_UNAVAILABLE"
        assert world.grid.probes == 2  # refusals stand, too
        async with world.orchestrator() as stub:
            await stub.RevokeVm(pb.RevokeVmRequest(uuid=guest.uuid), timeout=TIMEOUT)
        await asyncio.sleep(1.05)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent.Probe(agent_pb2.ProbeRequest(), timeout=TIMEOUT)
        assert facts(error.value)[1] == "VM_REVOKED"


async def test_a_probe_that_is_given_up_is_no_fault_of_the_middleware(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    guest = await world.enrolled()
    hung = asyncio.Event()

    async def hangs(*, timeout: float) -> None:
        await hung.wait()

    world.grid.card_lives = hangs  # type: ignore[method-assign]
    async with guest.agent() as agent:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError):
                await agent.Probe(agent_pb2.ProbeRequest(), timeout=0.2)
    await asyncio.sleep(0.3)
    hung.set()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
