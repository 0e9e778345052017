"""``secure-element`` as an administrator meets it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from secfunet.card import KeyAlgorithm
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.service.files import UnsafeFileError
from secfunet.service.settings import SettingsError, load_settings
from secure_element.applet import SessionKeyOrder
from secure_element.cli import app
from secure_element.errors import StoreError
from secure_element.segmentation import AnswerStyle
from secure_element.settings import CardSettings
from secure_element.store import CardStore, StoreSecret
from tests.support.cards import personalise, running_card
from tests.support.pki import CertificateAuthority

MINIMAL = 'socket = "card.sock"\nstore = "state/card.store"\n[store_key]\nfile = "card.key"\n'


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "secure_element.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=60,
    )


def config_in(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "card.toml"
    path.write_text(text)
    return path


def generate_pin(folder: Path) -> tuple[str, ...]:
    return (
        "--generate-pin",
        "--user-pin-file",
        str(folder / "user.pin"),
        "--administrator-keys-file",
        str(folder / "its.keys"),
    )


def test_help_and_version() -> None:
    assert "secure-element 0" in command("--version").stdout
    for words in (("--help",), ("init", "--help"), ("serve", "--help"), ("status", "--help")):
        assert command(*words).returncode == 0


def test_init_makes_store_keys_and_pin_once(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    made = command("init", "--config", str(config), *generate_pin(tmp_path))
    assert made.returncode == 0, made.stderr
    for name in ("state/card.store", "card.key", "user.pin", "its.keys"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    pin = (tmp_path / "user.pin").read_text().strip()
    assert len(pin) == 8
    assert pin not in made.stdout + made.stderr
    keys = AdministratorKeys.read(tmp_path / "its.keys")
    assert keys.version == 1
    assert len(keys.keys.enc) == 32
    assert keys.keys.enc.hex() not in made.stdout + made.stderr
    before = (tmp_path / "state/card.store").read_bytes()
    again = command("init", "--config", str(config), *generate_pin(tmp_path))
    assert again.returncode == 77
    assert "exists already" in again.stderr
    assert (tmp_path / "state/card.store").read_bytes() == before


def test_init_refuses_what_is_unsafe(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "user.pin").write_text("123456\n")
    (tmp_path / "user.pin").chmod(0o644)
    files = ("--user-pin-file", str(tmp_path / "user.pin"))
    refused = command("init", "--config", str(config), *files)
    assert refused.returncode == 78
    assert "chmod 600" in refused.stderr
    (tmp_path / "user.pin").write_text("12\n")
    (tmp_path / "user.pin").chmod(0o600)
    refused = command("init", "--config", str(config), *files)
    assert refused.returncode == 65
    assert "4 to 8" in refused.stderr
    (tmp_path / "user.pin").write_text("1234\n")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/card.keys").write_text("version = 1")
    (tmp_path / "state/card.keys").chmod(0o600)
    refused = command("init", "--config", str(config), *files)
    assert refused.returncode == 65
    assert "administrator's keys" in refused.stderr
    assert not (tmp_path / "state/card.store").exists()
    assert command("init", "--config", str(config), "--generate-pin").returncode == 2


def test_pin_and_passphrase_are_asked_for(tmp_path: Path) -> None:
    config = config_in(tmp_path, 'socket = "s"\nstore = "st"\n[store_key]\nprompt = true\n')
    answers = "1234\n1234\ncorrect horse\ncorrect horse\n"
    result = CliRunner().invoke(app, ["init", "--config", str(config)], input=answers)
    assert result.exit_code == 0, result.output
    assert "horse" not in result.output
    store = CardStore.open(tmp_path / "st", StoreSecret(b"correct horse", is_passphrase=True))
    assert store.contents.pin.attempts == 3
    store.close()


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(CardSettings, config_in(tmp_path))
    assert settings.socket == tmp_path / "card.sock"
    assert settings.store_key.file == tmp_path / "card.key"
    options = settings.options
    assert (options.answers, options.session_key_order, options.legacy_tls) == (
        AnswerStyle.DRAFT,
        SessionKeyOrder.TRACE,
        False,
    )
    for text, hint in (
        (MINIMAL.replace("store =", "stoer ="), "did you mean 'store'"),
        (MINIMAL + "prompt = true\n", "exactly one"),
        (MINIMAL.replace('file = "card.key"', ""), "exactly one"),
        (MINIMAL.replace('file = "card.key"', 'credential = "../key"'), "not a path"),
        ('segmentation = "none"\n' + MINIMAL, "segmentation"),
        ('socket_mode = "rw"\n' + MINIMAL, "socket_mode"),
    ):
        with pytest.raises(SettingsError, match=hint):
            load_settings(CardSettings, config_in(tmp_path, text))
    credential = load_settings(
        CardSettings, config_in(tmp_path, MINIMAL.replace('file = "card.key"', 'credential = "k"'))
    )
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(StoreError, match="CREDENTIALS_DIRECTORY"):
        credential.store_key.read()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "k").write_bytes(bytes(40))
    (tmp_path / "k").chmod(0o400)
    assert credential.store_key.read().secret == bytes(40)
    (tmp_path / "k").chmod(0o444)
    with pytest.raises(UnsafeFileError):
        credential.store_key.read()


def test_serve_says_what_is_wrong(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "card.key").touch(0o600)
    (tmp_path / "card.key").write_text("00" * 32)
    missing = command("serve", "--config", str(config))
    assert missing.returncode == 78
    assert "secure-element init" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert command("status", "--config", str(config)).returncode == 69


@pytest.mark.e2e
async def test_a_served_card(tmp_path: Path) -> None:
    port = 20000 + os.getpid() % 20000
    async with running_card(tmp_path, settings=f'metrics_port = {port}\nlog_level = "debug"') as card:
        certificate = await personalise(card, CertificateAuthority(), "vm", algorithm=KeyAlgorithm.RSA_2048)
        assert card.process is not None
        assert psutil.Process(card.process.pid).rlimit(resource.RLIMIT_CORE) == (0, 0)
        if os.geteuid() != 0:  # not dumpable: its memory is root's alone
            assert not os.access(f"/proc/{card.process.pid}/mem", os.R_OK)
        status = await asyncio.to_thread(command, "status", "--config", str(card.config), "--json")
        report = json.loads(status.stdout)
        assert (report["state"], report["pin_attempts"]) == ("free", 3)
        client = await card.connect("vm")
        await client.sign(1, bytes(32))
        busy = await asyncio.to_thread(command, "status", "--config", str(card.config))
        assert "in use" in busy.stdout
        page = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        )
        assert 'secure_element_commands_total{command="operate",sw1="90"} 1.0' in page
        second = await asyncio.to_thread(command, "serve", "--config", str(card.config))
        assert second.returncode == 78
        assert "in use" in second.stderr
        assert await client.certificate() == certificate
        await client.close()
        assert await card.stop() == 0
        log = card.log.read_text()
        assert "Traceback" not in log
        for secret in (card.user_pin, card.keys.keys.enc.hex().encode(), (tmp_path / "card.key").read_bytes().strip()):
            assert secret.decode() not in log
        assert {json.loads(line)["level"] for line in log.splitlines()} <= {"debug", "info"}
