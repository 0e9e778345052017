"""Orchestrators' certificates: one a name, and what was before it is worth nothing."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from dom0_middleware.errors import Refused
from dom0_middleware.orchestrator_authority import OrchestratorAuthority, Orchestrators, credential_paths
from secfunet.identity import der_of, load_certificate, thumbprint
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.middleware.v1 import orchestrator_pb2_grpc
from tests.dom0_middleware.test_cli import run, settings_of
from tests.dom0_middleware.test_lifecycle import refusal
from tests.dom0_middleware.world import TIMEOUT, World

LIST = pb.ListVmsRequest()
NOT_ALLOWED = (grpc.StatusCode.PERMISSION_DENIED, "ORCHESTRATOR_NOT_ALLOWED")


def authority_of(world: World) -> OrchestratorAuthority:
    """As another process opens it."""
    return OrchestratorAuthority.load(world.state, clock=time.time)


def thumbprint_of(world: World, name: str = "admin") -> str:
    return thumbprint(der_of(load_certificate(credential_paths(world.state, name)[0].read_bytes())))


@pytest.mark.parametrize("how", ["rotate", "remove"])
async def test_a_certificate_of_before_ends_at_once_on_open_connections_too(world: World, how: str) -> None:
    old = world.orchestrator_channel()
    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(old)
    await stub.ListVms(LIST, timeout=TIMEOUT)
    watch = stub.WatchEvents(pb.WatchEventsRequest())
    await watch.initial_metadata()
    getattr(authority_of(world), how)("admin")
    # The open connection; a quiet stream on it; and a new connection with the pair that somebody kept.
    assert await refusal(stub.ListVms(LIST, timeout=TIMEOUT)) == NOT_ALLOWED
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await asyncio.wait_for(watch.read(), 5)
    assert ended.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await old.close()
    if how == "rotate":
        async with world.orchestrator() as renewed:
            await renewed.ListVms(LIST, timeout=TIMEOUT)


async def test_a_kept_pair_opens_nothing_any_more(world: World, tmp_path: Path) -> None:
    kept = [path.read_bytes() for path in credential_paths(world.state, "admin")]
    old = thumbprint_of(world)
    authority_of(world).rotate("admin")
    paths = credential_paths(world.state, "admin")
    new = [path.read_bytes() for path in paths]
    for path, content in zip(credential_paths(tmp_path, "admin"), kept, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    credentials = grpc.ssl_channel_credentials(
        (world.state / "orchestrator-authority.pem").read_bytes(), kept[1], kept[0]
    )
    options = (("grpc.ssl_target_name_override", "secure-middleware"),)
    async with grpc.aio.secure_channel(f"unix:{world.state}/orchestrator.sock", credentials, options) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        assert await refusal(stub.ListVms(LIST, timeout=TIMEOUT)) == NOT_ALLOWED
    assert [path.read_bytes() for path in paths] == new
    refused = [record for record in world.audit() if record.get("reason") == "ORCHESTRATOR_NOT_ALLOWED"]
    assert f"certificate {old} of 'admin'" in str(refused[-1]["detail"])


async def test_a_certificate_that_ended_opens_nothing_on_an_open_connection(world: World) -> None:
    async with world.orchestrator() as stub:
        await stub.ListVms(LIST, timeout=TIMEOUT)
        world.clock_offset = 366 * 86400.0
        assert await refusal(stub.ListVms(LIST, timeout=TIMEOUT)) == NOT_ALLOWED


async def test_what_an_orchestrator_did_is_recorded_with_its_certificate(world: World) -> None:
    await world.create()
    first = thumbprint_of(world)
    authority_of(world).rotate("admin")
    await world.create("db")
    records = [record for record in world.audit() if record["action"] == "vm.create"]
    assert [record["certificate"] for record in records] == [first, thumbprint_of(world)]
    assert first != thumbprint_of(world)


async def test_add_refuses_a_name_that_has_a_certificate(world: World) -> None:
    before = thumbprint_of(world)
    with pytest.raises(Refused, match="orchestrator rotate admin"):
        authority_of(world).add("admin")
    assert thumbprint_of(world) == before
    for act in ("rotate", "remove"):
        with pytest.raises(Refused, match="no orchestrator 'nobody'"):
            getattr(authority_of(world), act)("nobody")


async def test_a_file_that_is_no_certificate_admits_nobody(world: World) -> None:
    path, _ = credential_paths(world.state, "admin")
    whole = path.read_bytes()
    async with world.orchestrator() as stub:
        for content in (b"", b"junk", os.urandom(100_000)):
            path.write_bytes(content)
            assert await refusal(stub.ListVms(LIST, timeout=TIMEOUT)) == NOT_ALLOWED
        path.write_bytes(whole)
        await stub.ListVms(LIST, timeout=TIMEOUT)


async def test_last_seen_is_of_the_present_certificate(world: World) -> None:
    async with world.orchestrator() as stub:
        await stub.ListVms(LIST, timeout=TIMEOUT)
    found = {each.name: each for each in Orchestrators(world.state).list()}
    assert found["admin"].last_seen is not None
    assert found["stranger"].last_seen is None
    authority_of(world).rotate("admin")
    assert {each.last_seen for each in Orchestrators(world.state).list()} == {None}


async def test_the_commands(world: World) -> None:
    config = settings_of(world)
    code, _, err = await run("orchestrator", "add", "admin", "--config", config)
    assert (code, "rotate admin" in err) == (1, True)
    assert (await run("orchestrator", "add", "ci", "--config", config))[0] == 0
    assert (await run("vm", "list", "--config", config))[0] == 0
    code, out, _ = await run("orchestrator", "list", "--json", "--config", config)
    rows = {row["name"]: row for row in json.loads(out)}
    assert (code, sorted(rows)) == (0, ["admin", "ci", "stranger"])
    assert rows["admin"]["certificate"] == thumbprint_of(world)
    assert (rows["admin"]["allowed"], rows["ci"]["allowed"]) == (True, False)
    assert (rows["admin"]["last_seen"] is None, rows["ci"]["last_seen"]) == (False, None)
    assert (await run("orchestrator", "rotate", "admin", "--config", config))[0] == 0
    assert (await run("vm", "list", "--config", config))[0] == 0
    assert (await run("orchestrator", "remove", "admin", "--config", config))[0] == 0
    code, _, err = await run("vm", "list", "--config", config)
    assert (code, "orchestrator add admin" in err) == (78, True)
    journal = world.state / "orchestrators.jsonl"
    acts = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(r["action"], r["decision"], r["name"]) for r in acts][-2:] == [
        ("orchestrator.remove", "permitted", "admin"),
        ("orchestrator.remove", "noted", "admin"),
    ]
    assert all(r["actor"]["uid"] == os.getuid() for r in acts)
    assert (await run("audit", "verify", "--file", journal))[0] == 0
