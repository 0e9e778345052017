"""The attacks of the threat model that need the whole chain, performed on it; and that one tenant sees nothing of another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from demo.attacks import copied_image, foreign_hypervisor, neighbour, replayed_container
from demo.processes import ProcessError, run
from demo.stack import Stack
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.identity import load_certificate

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


PROC = Path("/proc")


def verify(certificate: Path, signature: bytes, digest: bytes) -> None:
    """Raises InvalidSignature unless the key in ``certificate`` made the RSASSA-PSS signature."""
    key = load_certificate(certificate.read_bytes()).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
    key.verify(signature, digest, pss, Prehashed(hashes.SHA256()))


async def test_each_vm_signs_with_its_own_key_and_no_other(stack: Stack) -> None:
    message = b"who am I?"
    digest = hashlib.sha256(message).digest()
    signatures = {vm: await stack.agent(vm, "sign", "-", input_data=message) for vm in stack.vms}
    for signer in stack.vms:
        for owner in stack.vms:
            if signer == owner:
                verify(stack.layout.certificate(owner), signatures[signer], digest)
            else:
                with pytest.raises(InvalidSignature):
                    verify(stack.layout.certificate(owner), signatures[signer], digest)


async def test_a_neighbour_asks_for_this_key(stack: Stack) -> None:
    refusal = await neighbour(stack, "db", "web")
    assert refusal.words.startswith("PERMISSION_DENIED")


async def test_a_neighbours_message_cannot_be_decrypted(stack: Stack) -> None:
    ciphertext = await stack.agent("web", "encrypt", "-", input_data=b"for web only")
    assert await stack.agent("web", "decrypt", "-", input_data=ciphertext) == b"for web only"
    with pytest.raises(ProcessError):
        await stack.agent("db", "decrypt", "-", input_data=ciphertext)


async def test_a_token_on_another_hypervisor(stack: Stack) -> None:
    refusal = await foreign_hypervisor(stack, "web", "xen-2")
    assert "VM-Auth-Token" in refusal.words


async def test_a_replayed_container(stack: Stack) -> None:
    refusal = await replayed_container(stack, "web")
    assert refusal.by == "the agent"


async def test_no_secret_in_logs_arguments_or_environment(stack: Stack) -> None:
    """After all of the above: PINs, store keys, join secrets and tokens stand in no log, and in no process's arguments or environment."""
    layout = stack.layout
    secrets = [
        path.read_bytes().strip()
        for card in (*stack.vms, *stack.hypervisors, *stack.servers)
        for path in (
            layout.card(card) / "store.key",
            layout.card(card) / "user.pin",
        )
    ]
    for card in (*stack.vms, *stack.hypervisors, *stack.servers):
        keys = AdministratorKeys.read(layout.card(card) / "card.keys").keys
        secrets += [key.hex().encode() for key in (keys.enc, keys.mac, keys.dek)]
    secrets += [layout.token(vm, stack.host).read_bytes().strip() for vm in stack.vms]
    for daemon in stack.daemons.values():
        shown = daemon.log.read_bytes()
        if daemon.running:
            shown += b"".join((PROC / str(daemon.pid) / name).read_bytes() for name in ("cmdline", "environ"))
        for secret in secrets:
            assert secret not in shown, daemon.name
        assert b"PRIVATE KEY" not in shown
        assert b"Traceback" not in shown, daemon.name


async def test_files_are_for_their_owner_alone(stack: Stack) -> None:
    for path in stack.layout.folder.rglob("*"):
        if path.is_dir() or path.is_symlink() or path.suffix in {".pem", ".toml", ".log"}:
            continue
        open_to_all = path.stat().st_mode & 0o007
        inside_private = any(
            not parent.stat().st_mode & 0o077 for parent in path.parents if parent.is_relative_to(stack.layout.folder)
        )
        assert not open_to_all or inside_private, path


async def test_a_revoked_vm_and_back(stack: Stack) -> None:
    """Revocation at the grid counts at once, with sessions open."""
    listed = (await stack.gose("status", "--json")).decode()
    assert '"db"' in listed
    await stack.agent("db", "sign", "-", input_data=b"before")
    await stack.gose("revoke", "vm", "db")
    finished = await run(
        "vm-agent", "sign", "-", "--config", stack.layout.agent_config("db"), input_data=b"after", check=False
    )
    assert finished.exit_code == 77, finished.errors
    assert not finished.output
    await stack.agent("web", "sign", "-", input_data=b"others go on")


async def test_a_copied_image_without_its_domain(stack: Stack) -> None:
    refusal = await copied_image(stack, "web")
    assert "exit code 69" in refusal.words
    await stack.start_vm("web")
    await stack.agent("web", "sign", "-", input_data=b"the true one, started again")
