"""``vm-agent`` as a person uses it: real processes, openssl as the judge, exit codes and sentences."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import MiddlewareDouble

VM_AGENT = Path(sys.executable).with_name("vm-agent")


async def vm_agent(*words: str | Path, data: bytes = b"") -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(
        VM_AGENT,
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(data), 30)
    return process.returncode or 0, output, errors.decode()


def openssl(*words: str | Path, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *words], input=data, capture_output=True, timeout=30).stdout


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.fixture
async def daemon(middleware: MiddlewareDouble, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """``vm-agent serve``, waited for as systemd does."""
    config = folder / "vm-agent.toml"
    config.write_text('log_level = "info"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(folder / "n"))
        notify.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            VM_AGENT,
            "serve",
            "--config",
            config,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "n")},
            stderr=asyncio.subprocess.PIPE,
        )
        told = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(notify, 100), 20)
        assert told == b"READY=1"
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_file_is_signed_and_openssl_agrees(
    daemon: asyncio.subprocess.Process, folder: Path, middleware: MiddlewareDouble
) -> None:
    at = ("--config", folder / "vm-agent.toml")
    data, signature, public = folder / "data", folder / "data.sig", folder / "vm.pub"
    data.write_bytes(os.urandom(3_000_000))

    code, _, errors = await vm_agent("sign", *at, "--out", signature, data)
    assert (code, errors) == (0, "")
    code, pem, _ = await vm_agent("identity", *at, "--pem")
    assert code == 0
    public.write_bytes(openssl("x509", "-pubkey", "-noout", data=pem))
    verify = ["dgst", "-sha256", "-verify", public, "-signature", signature]
    pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"]
    assert b"Verified OK" in openssl(*verify, *pss, data)
    assert len(middleware.batches[0].SerializeToString()) < 200  # only the digest travelled

    code, output, _ = await vm_agent("sign", *at, "--scheme", "rsassa-pkcs1-v1_5-sha256", "-", data=data.read_bytes())
    signature.write_bytes(output)
    assert b"Verified OK" in openssl(*verify, data)

    digest = hashlib.sha256(data.read_bytes()).digest()
    code, output, _ = await vm_agent("sign", *at, "--scheme", "rsassa-pkcs1-v1_5-sha256", "--digest", "-", data=digest)
    assert output == signature.read_bytes()

    code, sealed, _ = await vm_agent("encrypt", *at, "-", data=b"a secret")
    code, opened, _ = await vm_agent("decrypt", *at, "-", data=sealed)
    assert (code, opened) == (0, b"a secret")

    status = json.loads((await vm_agent("status", *at, "--json"))[1])
    assert status["connected"] is True
    assert status["problem"] == ""
    identity = json.loads((await vm_agent("identity", *at, "--json"))[1])
    assert identity["operations"] == ["sign", "decrypt", "encrypt"]


async def test_exit_codes(daemon: asyncio.subprocess.Process, folder: Path, middleware: MiddlewareDouble) -> None:
    at = ("--socket", folder / "agent.sock")
    assert (await vm_agent("sign", *at, "--digest", "-", data=b"short"))[0] == 65
    assert (await vm_agent("sign", *at, "--digest", "-", data=bytes(513)))[0] == 65
    assert (await vm_agent("decrypt", *at, "-", data=b"not as long as the modulus"))[0] == 65
    assert (await vm_agent("sign", *at, "--scheme", "md5", "-"))[0] == 2
    assert (await vm_agent("sign", *at))[0] == 2
    assert (await vm_agent("sign", *at, folder / "missing"))[0] == 1
    (folder / "bad.toml").write_text("jion = 1")
    code, _, errors = await vm_agent("serve", "--config", folder / "bad.toml")
    assert code == 78
    assert "did you mean 'join'?" in errors
    code, _, errors = await vm_agent("serve", "--config", folder / "vm-agent.toml")
    assert code == 78
    assert "another agent" in errors
    await middleware.stop()
    assert (await vm_agent("sign", *at, "--timeout", "0.5", "-"))[0] == 69
    assert (await vm_agent("status", *at))[0] == 69


async def test_a_missing_and_a_dead_daemon_are_told_apart(folder: Path) -> None:
    at = ("--socket", folder / "agent.sock")
    code, _, errors = await vm_agent("sign", *at, "-")
    assert code == 69
    assert "there is no agent" in errors
    assert "vm-agent serve" in errors
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "agent.sock"))
    code, _, errors = await vm_agent("status", *at)
    assert code == 69
    assert "is dead" in errors
    assert "Traceback" not in errors


async def test_sigterm_is_a_clean_end(daemon: asyncio.subprocess.Process, folder: Path) -> None:
    daemon.send_signal(signal.SIGTERM)
    _, errors = await asyncio.wait_for(daemon.communicate(), 10)
    assert daemon.returncode == 0
    assert b"Traceback" not in errors
    assert not (folder / "agent.sock").exists()


async def test_killed_and_started_again(
    daemon: asyncio.subprocess.Process, folder: Path, middleware: MiddlewareDouble
) -> None:
    """kill -9 leaves a state folder, a lock and a socket that the next agent can use; the join secret is not needed again."""
    at = ("--config", folder / "vm-agent.toml")
    assert (await vm_agent("sign", *at, "-", data=b"x"))[0] == 0
    daemon.kill()
    await daemon.wait()
    await started_again_it_signs(at)
    assert middleware.enrolments == 1


async def test_killed_before_the_answer_to_its_enrolment(folder: Path, middleware: MiddlewareDouble) -> None:
    """dom0 has taken the secret for the killed agent's key, and has erased what it handed over."""
    at = ("--config", folder / "vm-agent.toml")
    (folder / "vm-agent.toml").write_text('log_level = "info"\n')
    middleware.lost = 1000
    first = await asyncio.create_subprocess_exec(VM_AGENT, "serve", *at, stderr=asyncio.subprocess.DEVNULL)
    try:
        await eventually(lambda: middleware.enrolments > 0)
    finally:
        first.kill()
        await first.wait()
    middleware.join_json.unlink()
    middleware.lost = 0
    await started_again_it_signs(at)


async def started_again_it_signs(at: tuple[str, Path]) -> None:
    again = await asyncio.create_subprocess_exec(VM_AGENT, "serve", *at, stderr=asyncio.subprocess.DEVNULL)
    try:
        for _ in range(50):
            code, _, errors = await vm_agent("sign", *at, "-", data=b"x")
            if code == 0:
                break
            await asyncio.sleep(0.1)
        assert (code, errors) == (0, "")
    finally:
        again.terminate()
        await again.wait()


async def test_an_idle_daemon_is_small(daemon: asyncio.subprocess.Process, middleware: MiddlewareDouble) -> None:
    await eventually(lambda: middleware.enrolments == 1)
    await asyncio.sleep(0.5)
    assert resident_kib(daemon.pid) < 60 * 1024
