"""A card that is personalised from its own host, by an authority on another one; its PIN and keys. By commands, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509

from demo.processes import run
from secfunet.card.administrator_keys import AdministratorKeys
from tests.support.cards import running_card

pytestmark = pytest.mark.e2e


async def grid(folder: Path, *words: object) -> str:
    config = folder / "gose.toml"
    if not config.exists():
        config.write_text('state = "grid"\n')
        config.chmod(0o600)
        await run("gose", "init", "--config", config)
    return (await run("gose", *words, "--config", config)).output.decode()


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


async def test_three_steps_over_two_hosts(tmp_path: Path) -> None:
    request, certificate, authority = tmp_path / "xen.csr", tmp_path / "xen.pem", tmp_path / "grid/authority/ca.pem"
    async with running_card(tmp_path) as card:
        here = ("--config", card.config, "--administrator-keys-file", card.keys_file)
        await run("secure-element", "request", "xen-1", "--out", request, "--key", "rsa-2048", *here)
        first = x509.load_pem_x509_csr(request.read_bytes()).public_key()
        # A run that died before the certificate came is run again: it is the same key.
        await run("secure-element", "request", "xen-1", "--out", request, *here)
        assert x509.load_pem_x509_csr(request.read_bytes()).public_key() == first
        assert "xen-1 is enrolled" in await grid(
            tmp_path, "sign-hypervisor", "xen-1", "--request", request, "--out", certificate
        )
        await run("secure-element", "install", "--certificate", certificate, "--authority", authority, *here)
        status = json.loads((await run("secure-element", "status", "--config", card.config, "--json")).output)
        assert status["state"] == "free"
        # What is there is not overwritten by mistake.
        refused = await run("secure-element", "request", "xen-1", "--out", request, *here, check=False)
        assert refused.exit_code == 1
        assert "--renew" in refused.errors
        again = tmp_path / "again"
        enrolled = ("sign-hypervisor", "xen-1", "--request", request, "--out", again)
        with pytest.raises(Exception, match="enrolled already"):
            await grid(tmp_path, *enrolled)
        # Renewal: the same key, another certificate.
        await run("secure-element", "request", "xen-1", "--out", request, "--renew", *here)
        assert x509.load_pem_x509_csr(request.read_bytes()).public_key() == first
        await grid(tmp_path, *enrolled, "--replace")
        await run("secure-element", "install", "--certificate", again, "--authority", authority, *here)
        assert serial(again) != serial(certificate)


async def test_a_certificate_for_another_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    request, certificate = tmp_path / "csr", tmp_path / "pem"
    async with running_card(tmp_path / "a") as one, running_card(tmp_path / "b") as other:
        for card, name in ((one, "xen-1"), (other, "xen-2")):
            here = ("--config", card.config, "--administrator-keys-file", card.keys_file)
            await run("secure-element", "request", name, "--out", request, *here)
        await grid(tmp_path, "sign-hypervisor", "xen-2", "--request", request, "--out", certificate)
        authority = tmp_path / "grid/authority/ca.pem"
        here = ("--config", one.config, "--administrator-keys-file", one.keys_file)
        files = ("--certificate", certificate, "--authority", authority)
        refused = await run("secure-element", "install", *files, *here, check=False)
        assert refused.exit_code == 1
        assert "refuses the certificate" in refused.errors
        files = ("--certificate", certificate, "--authority", certificate)
        refused = await run("secure-element", "install", *files, *here, check=False)
        assert "no certificate of that authority" in refused.errors


async def test_a_request_for_another_name_is_refused(tmp_path: Path) -> None:
    async with running_card(tmp_path) as card:
        here = ("--config", card.config, "--administrator-keys-file", card.keys_file)
        await run("secure-element", "request", "xen-2", "--out", tmp_path / "csr", *here)
        with pytest.raises(Exception, match="xen-1"):
            await grid(tmp_path, "sign-hypervisor", "xen-1", "--request", tmp_path / "csr", "--out", tmp_path / "pem")
        with pytest.raises(Exception, match="no PKCS#10"):
            await grid(tmp_path, "sign-hypervisor", "xen-1", "--request", card.keys_file, "--out", tmp_path / "pem")


async def test_a_pin_is_changed_and_unblocked(tmp_path: Path) -> None:
    def secret(name: str, value: bytes) -> Path:
        path = tmp_path / name
        path.touch(mode=0o600)
        path.write_bytes(value)
        return path

    async with running_card(tmp_path) as card:
        here, new = ("--config", card.config), secret("new", b"87654321")
        change = ("secure-element", "pin", "change", *here, "--new-pin-file", new)
        wrong = await run(*change, "--old-pin-file", secret("wrong", b"notit"), check=False)
        assert "2 attempts are left" in wrong.errors
        await run(*change, "--old-pin-file", card.user_pin_file)
        # One wrong attempt, and then the last one is withheld.
        for _ in range(2):
            await run(*change, "--old-pin-file", tmp_path / "wrong", check=False)
        withheld = await run(*change, "--old-pin-file", tmp_path / "wrong", check=False)
        assert "not tried: 1 attempts" in withheld.errors
        status = json.loads((await run("secure-element", "status", *here, "--json")).output)
        assert status["pin_attempts"] == 1
        keys = ("--administrator-keys-file", card.keys_file)
        await run("secure-element", "pin", "unblock", *here, *keys, "--new-pin-file", card.user_pin_file)
        status = json.loads((await run("secure-element", "status", *here, "--json")).output)
        assert status["pin_attempts"] == 3


async def test_keys_are_rotated_however_often_it_is_interrupted(tmp_path: Path) -> None:
    async with running_card(tmp_path) as card:
        here = ("--config", card.config, "--administrator-keys-file", card.keys_file)
        first = card.keys
        said = await run("secure-element", "keys", "rotate", *here)
        second = card.keys
        assert b"key set 2" in said.output
        assert second.keys != first.keys
        coming = card.keys_file.with_name(card.keys_file.name + ".new")
        assert not coming.exists()
        # It died before the card had the new keys, and after: the next run finds out.
        AdministratorKeys.generate(3).write(coming)
        await run("secure-element", "keys", "rotate", *here)
        third = card.keys
        assert third.version == 3
        second.write(card.keys_file)
        third.write(coming)
        await run("secure-element", "keys", "rotate", *here)
        assert card.keys == third
        # The old keys are worth nothing.
        first.write(tmp_path / "old.keys")
        words = ("--config", card.config, "--administrator-keys-file", tmp_path / "old.keys", "--out", tmp_path / "csr")
        refused = await run("secure-element", "request", "xen-1", *words, check=False)
        assert refused.exit_code == 77
        assert "no administrator's keys of version 1" in refused.errors
        await run("secure-element", "request", "xen-1", *here, "--out", tmp_path / "csr")
