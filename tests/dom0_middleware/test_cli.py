"""The command line, as a process of its own against a running daemon where it needs one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dom0_middleware.audit import Action, DomainRecord
from dom0_middleware.vm_file import DefinitionError, definition_from_json, definition_to_json
from secfunet.identity import der_of, pem_of
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.audit import AuditLog
from tests.dom0_middleware.world import World, certificate, eventually, grid_authority, token

FIELDS = ("uuid", "name", "address", "memory_mib", "vcpus", "vm_certificate")
COMMAND = [sys.executable, "-c", "from dom0_middleware.cli import main; main()"]


async def run(*arguments: str | Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@given(untrusted=st.binary(max_size=200))
@example(untrusted=b"[" * 100_000)
@example(untrusted=b"[" * 20_000)
@example(untrusted=json.dumps(dict.fromkeys(FIELDS, "x")).encode())
@example(untrusted=json.dumps(dict.fromkeys(FIELDS, 1)).encode())
@example(untrusted=json.dumps({**dict.fromkeys(FIELDS, "x"), "memory_mib": -1, "vcpus": 1}).encode())
@example(untrusted=json.dumps({**dict.fromkeys(FIELDS, "x"), "memory_mib": True, "vcpus": 1}).encode())
@example(untrusted=json.dumps({**dict.fromkeys(FIELDS, "x"), "memory_mib": 1, "vcpus": 1}).encode())
def test_any_file_is_a_definition_or_refused(untrusted: bytes) -> None:
    with pytest.raises(DefinitionError):
        definition_from_json(untrusted)


def test_a_definition_survives_its_file() -> None:
    definition = pb.VmDefinition(
        uuid="6695eb01-f6a4-8304-79aa-97f2502e193f",
        name="web",
        vm_certificate=certificate("web"),
        memory_mib=512,
        vcpus=2,
        address="192.0.2.7",
    )
    assert definition_from_json(definition_to_json(definition).encode()) == definition


async def test_init_makes_what_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    config = tmp_path / "dom0" / "secure-middleware.toml"
    code, out, err = await run("init", "--config", config)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["made"] * 5 + ["Next:", "1.", "2.", "3."]
    assert f"{tmp_path}/dom0/policy.toml: it allows nothing yet" in out
    state = tmp_path / "dom0" / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    for key in ("guest-authority.key", "orchestrator-authority.key", "orchestrators/admin.key"):
        assert (state / key).stat().st_mode & 0o777 == 0o600
    before = (state / "guest-authority.key").read_bytes()
    assert (await run("init", "--config", config))[:2] == (0, "")
    assert (state / "guest-authority.key").read_bytes() == before
    code, out, _ = await run("policy", "check", "--config", config)
    assert code == 0
    assert "everything is denied" in out
    code, _, err = await run("orchestrator", "add", "ops", "--config", config)
    assert code == 0
    assert "orchestrators.allowed" in err
    code, _, err = await run("vm", "list", "--config", config)
    assert code == 69
    assert "is 'secure-middleware serve' running?" in err


async def test_a_setting_that_does_not_exist_is_refused_with_a_hint(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    await run("init", "--config", config)
    config.write_text(config.read_text().replace("policy =", "polcy ="))
    code, _, err = await run("vm", "list", "--config", config)
    assert code == 78
    assert "did you mean 'policy'?" in err


async def test_policy_check_says_every_problem(tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('[[rule]]\nnames = ["*"]\noperatons = ["sign"]\nschemes = ["nothing-*"]\noperations = ["sign"]')
    code, _, err = await run("policy", "check", "--file", policy)
    assert code == 78
    assert "did you mean 'operations'?" in err


async def test_audit_verify(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    writer = AuditLog(log, clock=lambda: 1.0)
    writer.open()
    for _ in range(3):
        writer.record(DomainRecord(Action.OPERATION, "permitted"))
    writer.close()
    code, out, _ = await run("audit", "verify", "--file", log)
    assert code == 0
    assert "sound: 3 records (1 to 3" in out
    log.write_bytes(log.read_bytes().replace(b"permitted", b"refused", 1))
    code, out, err = await run("audit", "verify", "--file", log)
    assert (code, out) == (65, "")
    assert "changed" in err
    code, out, _ = await run("audit", "verify", "--file", log, "--json")
    assert code == 65
    assert json.loads(out)["problems"][0]["line"] == 1


async def test_a_log_that_is_not_there_was_not_changed(tmp_path: Path) -> None:
    """65 says that somebody changed the log: whoever watches for that must not be woken by a wrong path."""
    code, _, err = await run("audit", "verify", "--file", tmp_path / "nope")
    assert code == 1
    assert "nope" in err


def settings_of(world: World) -> Path:
    """A settings file for commands that call its daemon."""
    config = world.folder / "middleware.toml"
    config.write_text(
        'state = "s"\npolicy = "policy.toml"\n[card]\nsocket = "c"\nuser_pin_file = "p"\n[grid]\n'
        'service_provider = "https://localhost:8443"\noperations = "localhost:8444"\n'
        'openid_provider = "https://localhost:9443"\nopenid_login = "https://localhost:9444"\nauthority = "g.pem"\n'
    )
    return config


async def test_the_life_of_a_vm(world: World, tmp_path: Path) -> None:
    config = settings_of(world)
    pem, jwt = tmp_path / "web.pem", tmp_path / "web.jwt"
    pem.write_bytes(pem_of(certificate("web")))
    jwt.write_text(token("web") + "\n")
    watch = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("vm", "watch", "--json", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        # Whoever runs the tests in the background of a shell has the signal ignored, and every child with it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        await eventually(lambda: world.service.events._queues, within=30)
        create = ("vm", "create", "--name", "web", "--certificate", pem, "--token-file", jwt, "--config", config)
        code, out, _ = await run(*create, "--json")
        assert code == 0
        uuid = json.loads(out)[0]["uuid"]
        code, _, err = await run(*create)
        assert code == 1
        assert "VM_EXISTS" in err
        code, out, _ = await run("vm", "start", "web", "--json", "--config", config)
        assert code == 0
        join_secret = json.loads((Path(json.loads(out)["guest_channel"]) / "join.json").read_bytes())["join_secret"]
        code, out, _ = await run("vm", "list", "--config", config)
        assert uuid in out
        assert "running" in out
        assert json.loads((await run("vm", "show", uuid, "--json", "--config", config))[1])["state"] == "running"
        assert (await run("vm", "delete", "web", "--config", config))[0] == 1
        definition = tmp_path / "web.json"
        assert (await run("vm", "export", "web", "--out", definition, "--config", config))[0] == 0
        assert definition_from_json(definition.read_bytes()).uuid == uuid
        code, _, err = await run("vm", "migrate", "web", "--to", "xen-2", "--config", config)
        assert (code, "DESTINATION_NOT_ALLOWED" in err) == (77, True)
        code, _, err = await run("vm", "expect", definition, "--config", config)
        assert (code, "VM_STATE_WRONG" in err) == (1, True)
        code, _, err = await run("vm", "expect", pem, "--config", config)
        assert (code, "it is no JSON" in err) == (65, True)
        package, seed = tmp_path / "agent_1.deb", tmp_path / "seed.iso"
        package.write_bytes(b"!<arch>\ndebian-binary")
        user_data = ("vm", "user-data", "web", "--config", config)
        code, out, _ = await run(*user_data, "--package-url", f"http://example.org/agent_1.deb#sha256={'0' * 64}")
        assert (code, out.partition("\n")[0]) == (0, "#cloud-config")
        code, _, err = await run(*user_data, "--package-url", "http://example.org/agent_1.deb")
        assert (code, "#sha256=DIGEST" in err) == (65, True)
        code, _, err = await run(*user_data, "--package", package)
        assert (code, "--seed" in err) == (65, True)
        assert (await run(*user_data, "--package", package, "--seed", seed))[0] == 0
        assert uuid.encode() in seed.read_bytes()
        assert join_secret.encode() not in seed.read_bytes()
        assert json.loads((await run("vm", "revoke", "web", "--json", "--config", config))[1])[0]["revoked"]
        assert (await run("vm", "stop", "web", "--config", config))[0] == 0
        assert (await run("vm", "delete", uuid, "--config", config))[0] == 0
        assert (await run("vm", "show", "web", "--config", config))[0] == 65
        code, _, err = await run("vm", "list", "--as", "stranger", "--config", config)
        assert code == 77
        assert "ORCHESTRATOR_NOT_ALLOWED" in err
        assert (await run("audit", "verify", "--config", config))[0] == 0
        assert watch.stdout is not None
        kinds = [json.loads(await watch.stdout.readline())["event"] for _ in range(5)]
        assert kinds[0] == "created"
        assert kinds[-1] == "deleted"
        watch.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(watch.wait(), 10) == 0
    finally:
        if watch.returncode is None:
            watch.kill()
            await watch.wait()


@pytest.mark.e2e
async def test_serve_is_a_daemon(tmp_path: Path) -> None:
    """Starts without card and grid, reads its policy again on SIGHUP, survives kill -9, stops cleanly on SIGTERM."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as short:
        folder = Path(short)
        config = folder / "c.toml"
        await run("init", "--config", config)
        (folder / "card.pin").touch(mode=0o600)
        (folder / "grid-ca.pem").write_bytes(pem_of(der_of(grid_authority().certificate)))
        pem = folder / "web.pem"
        pem.write_bytes(pem_of(certificate("web")))
        for how in (signal.SIGKILL, signal.SIGTERM):
            process = await asyncio.create_subprocess_exec(
                *COMMAND, "serve", "--config", str(config), stderr=asyncio.subprocess.DEVNULL
            )
            try:
                for _ in range(100):
                    code, out, _ = await run("vm", "list", "--json", "--config", config)
                    if code == 0:
                        break
                    await asyncio.sleep(0.1)
                vms = json.loads(out)
                if how is signal.SIGKILL:
                    assert vms == []
                    create = ("vm", "create", "--name", "web", "--certificate", pem, "--config", config)
                    assert (await run(*create))[0] == 0
                    assert (await run("vm", "start", "web", "--config", config))[0] == 0
                else:
                    assert [(vm["name"], vm["state"]) for vm in vms] == [("web", "stopped")]
                    assert list((folder / "state" / "guests").iterdir()) == []
                    config.write_text(config.read_text().replace('allowed = ["admin"]', "allowed = []"))
                    (folder / "policy.toml").write_text("broken")
                    process.send_signal(signal.SIGHUP)
                    code, _, err = await run("vm", "list", "--config", config)
                    assert code == 77
                    assert "ORCHESTRATOR_NOT_ALLOWED" in err
            finally:
                if process.returncode is None:
                    await asyncio.sleep(0.2)
                    process.send_signal(how)
                code = await asyncio.wait_for(process.wait(), 20)
            assert code == (-9 if how is signal.SIGKILL else 0)
            code, _, err = await run("audit", "verify", "--config", config)
            assert (code, err) == (0, "")
        log = [json.loads(line) for line in (folder / "state" / "audit.jsonl").read_text().splitlines()]
        assert [r["action"] for r in log if r.get("reason") == "POLICY_INVALID"] == ["policy.read"]
        assert log[-1]["action"] == "daemon.stop"
        assert not (folder / "state" / "orchestrator.sock").exists()


async def test_a_uuid_is_looked_up_before_a_name(world: World) -> None:
    config = settings_of(world)
    web = await world.create("web")
    impostor = await world.create("db")
    # As one that was made when such names were given.
    world.service._store._execute("UPDATE vms SET name=? WHERE uuid=?", (web, impostor))
    code, _, err = await run("vm", "revoke", web, "--config", config)
    assert code == 65
    assert "is the UUID of one VM and the name of another" in err
    async with world.orchestrator() as stub:
        assert not any(vm.revoked for vm in (await stub.ListVms(pb.ListVmsRequest(), timeout=10)).vms)
    assert (await run("vm", "revoke", impostor, "--config", config))[0] == 0
    assert (await run("vm", "show", "web", "--config", config))[1].split()[1] == web
