"""What a user of the README does: the demonstration, and the commands in a VM, checked by openssl."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from demo.attacks import public_key_pem
from demo.evidence import last_login
from demo.processes import run
from demo.stack import Stack

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")
SCHEMES = {
    "rsassa-pss-sha256": ("-sha256", *PSS),
    "rsassa-pss-sha384": ("-sha384", *PSS),
    "rsassa-pss-sha512": ("-sha512", *PSS),
    "rsassa-pkcs1-v1_5-sha256": ("-sha256",),
    "rsassa-pkcs1-v1_5-sha384": ("-sha384",),
    "rsassa-pkcs1-v1_5-sha512": ("-sha512",),
}


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_openssl_verifies_every_scheme(stack: Stack, tmp_path: Path, scheme: str) -> None:
    document, signature, public = tmp_path / "document", tmp_path / "signature", tmp_path / "public.pem"
    document.write_bytes(b"a document" * 10_000)
    public.write_bytes(public_key_pem(stack.layout.certificate("web")))
    await stack.agent("web", "sign", str(document), "--scheme", scheme, "--out", str(signature))
    options = SCHEMES[scheme]
    verified = await run("openssl", "dgst", *options, "-verify", public, "-signature", signature, document)
    assert verified.output == b"Verified OK\n"
    document.write_bytes(b"another document")
    refused = await run("openssl", "dgst", *options, "-verify", public, "-signature", signature, document, check=False)
    assert refused.exit_code == 1


async def test_openssl_encrypts_and_the_vm_decrypts(stack: Stack, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(public_key_pem(stack.layout.certificate("web")))
    oaep = ("-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:sha256", "-pkeyopt", "rsa_mgf1_md:sha256")
    encrypt = ("openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", public, *oaep)
    ciphertext = (await run(*encrypt, input_data=b"the disk's passphrase")).output
    assert await stack.agent("web", "decrypt", "-", input_data=ciphertext) == b"the disk's passphrase"


async def test_identity_status_and_lists(stack: Stack) -> None:
    pem = await stack.agent("web", "identity", "--pem")
    assert pem.strip() == stack.layout.certificate("web").read_bytes().strip()
    assert b'"enrolled": true' in await stack.agent("web", "status", "--json")
    listed = await stack.middleware("vm", "list", "--json")
    assert re.findall(rb'"name": "(\w+)"', listed) == [b"db", b"web"] or set(
        re.findall(rb'"name": "(\w+)"', listed)
    ) == {b"db", b"web"}


async def test_a_correlation_id_runs_from_agent_to_card(stack: Stack) -> None:
    """The same id stands in the audit of dom0 and in the log of the grid."""
    await stack.agent("web", "sign", "-", input_data=b"follow me")
    audit = (stack.layout.host(stack.host) / "state" / "audit.jsonl").read_text().splitlines()
    grid = stack.daemons["gose"].log.read_text()
    record = json.loads(next(line for line in reversed(audit) if '"sign"' in line))
    assert re.fullmatch(r"[0-9a-f]{16}-1", record["correlation"])
    assert record["correlation"] in grid
    assert record["digest"] == hashlib.sha256(b"follow me").hexdigest()
    # The agent's line of the call: which program it was.
    assert record["program"]["uid"] == os.getuid()
    assert "python" in record["program"]["executable"]
    (line,) = (
        line for line in stack.daemons["agent-web"].log.read_text().splitlines() if record["guest_correlation"] in line
    )
    assert str(record["program"]["pid"]) in line


async def test_a_hangup_ends_no_daemon_and_is_answered(stack: Stack) -> None:
    """Operators send it by habit, and so do scripts and closed terminals."""
    for name, daemon in stack.daemons.items():
        before = daemon.log.read_text().count("the settings were read again")
        os.kill(daemon.pid, signal.SIGHUP)
        deadline = time.monotonic() + 30
        while daemon.log.read_text().count("the settings were read again") == before:
            assert daemon.running, name
            assert time.monotonic() < deadline, (name, daemon.log.read_text()[-2000:])
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    assert all(daemon.running for daemon in stack.daemons.values())
    await stack.agent("web", "sign", "-", input_data=b"still there")


async def test_vms_of_a_host_share_its_login(stack: Stack) -> None:
    """What the story tells of a VM's session, also if the login behind it was made for the other VM."""
    for vm in stack.vms:
        await stack.agent(vm, "sign", "-", input_data=b"sign this")
    seen = [last_login(stack, vm) for vm in stack.vms]
    assert {one.hypervisor for one in seen} == {stack.host}
    assert [one.seid for one in seen] == list(stack.vms)
    assert len({one.session for one in seen}) == len(stack.vms)


async def test_every_command_has_help_and_version() -> None:
    for command in ("secure-element", "gose", "secure-middleware", "vm-agent"):
        assert (await run(command, "--version")).output.decode().startswith(f"{command} 0.")
        assert b"--help" in (await run(command, "--help")).output
