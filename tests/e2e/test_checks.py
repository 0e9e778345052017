"""``check`` of the card and of the agent: what would keep them from work is said before they are started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.processes import run
from demo.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


async def states(*command: str | Path) -> tuple[int, dict[str, str]]:
    done = await run(*command, "--json", check=False)
    return done.exit_code, {one["what"]: one["state"] for one in json.loads(done.output)}


async def test_what_runs_is_found_well_and_goes_on(stack: Stack) -> None:
    card = stack.layout.card("web") / "secure-element.toml"
    assert await states("secure-element", "check", "--config", card) == (
        0,
        {"socket": "ok", "store_key": "ok", "store": "ok"},
    )
    code, found = await states("vm-agent", "check", "--config", stack.layout.agent_config("web"))
    assert (code, found["agent"], found["enrolment"]) == (0, "ok", "ok")
    await stack.agent("web", "sign", "-", input_data=b"it was not disturbed")


async def test_what_would_keep_a_card_from_being_served(tmp_path: Path) -> None:
    config = tmp_path / "card.toml"
    config.write_text('socket = "card.sock"\nstore = "card.store"\n[store_key]\nfile = "store.key"\n')
    assert (await states("secure-element", "check", "--config", config))[0] == 78
    (tmp_path / "user.pin").write_text("12345678\n")
    (tmp_path / "user.pin").chmod(0o600)
    await run("secure-element", "init", "--config", config, "--user-pin-file", tmp_path / "user.pin")
    code, found = await states("secure-element", "check", "--config", config)
    assert (code, found["store"], found["identities"]) == (0, "ok", "warning")
    (tmp_path / "store.key").write_text("00" * 32)
    code, found = await states("secure-element", "check", "--config", config)
    assert (code, found["store"]) == (78, "wrong")
    (tmp_path / "store.key").chmod(0o644)
    code, found = await states("secure-element", "check", "--config", config)
    assert (code, found["store_key"]) == (78, "wrong")


async def test_what_would_keep_an_agent_from_working(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('join = "join.json"\ngroup = "no-such-group"\n')
    code, found = await states("vm-agent", "check", "--config", config)
    assert (code, found["group"], found["join"]) == (78, "wrong", "away")
    config.write_text('join = "join.json"\n')
    assert (await states("vm-agent", "check", "--config", config))[0] == 69
    (tmp_path / "join.json").write_text("{}")
    (tmp_path / "join.json").chmod(0o600)
    code, found = await states("vm-agent", "check", "--config", config)
    assert (code, found["join"]) == (78, "wrong")
