"""``secure-element authenticate`` as a person or a script meets it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secfunet.card import KeyAlgorithm
from secfunet.service.cli import ExitCode
from secfunet.service.files import UnsafeFileError
from secure_element.authenticate import RadiusSecretError
from secure_element.cli import app
from tests.interop_radius.freeradius import SECRET, running_freeradius
from tests.interop_radius.world import NAME, ServerIdentity, load
from tests.support.cards import CardProcess, running_card
from tests.support.pki import CertificateAuthority


async def command(card: CardProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = ("authenticate", "--config", str(card.config), "--user-pin-file", str(card.user_pin_file), *arguments)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "secure_element.cli", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(words, process.returncode, out.decode(), err.decode())


def secret_in(path: Path, secret: bytes) -> str:
    path.touch(0o600)
    path.write_bytes(secret + b"\n")
    return str(path)


@pytest.mark.e2e
@pytest.mark.interop
@pytest.mark.timeout(300)
async def test_the_command(tmp_path: Path) -> None:
    ca, foreign = CertificateAuthority("Ours"), CertificateAuthority("Theirs")
    secret = secret_in(tmp_path / "secret", SECRET)
    wrong = secret_in(tmp_path / "wrong", b"another secret, as long as that.")
    async with running_card(tmp_path) as card:
        await load(card, "alice", lambda key: ca.issue(key, "alice"), [ca], key=KeyAlgorithm.P_256)
        await load(card, "mallory", lambda key: foreign.issue(key, "mallory"), [ca], key=KeyAlgorithm.P_256)
        async with running_freeradius(tmp_path, **ServerIdentity(ca).files, authorities=[ca.pem]) as radius:
            server = ("--radius", f"127.0.0.1:{radius.port}", "--secret-file", secret)
            done = await command(card, *server, "--server-name", NAME, "--json")
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout)
            assert (report["identity"], report["tls"]) == ("alice", "1.3")
            for more, code, words in (
                (("--server-name", "other.example"), ExitCode.REFUSED, "names others"),
                (("--identity", "mallory"), ExitCode.REFUSED, "the server refuses the card"),
                (("--tls", "1.2"), ExitCode.REFUSED, "refuses"),  # this server has 1.3 only
                (("--secret-file", wrong, "--timeout", "6"), ExitCode.UNAVAILABLE, "another secret"),
            ):
                result = await command(card, *server, *more)
                assert result.returncode == code, (more, result.stderr)
                assert words in result.stderr
                assert "Traceback" not in result.stderr
                for given in (SECRET.decode(), card.user_pin.decode()):
                    assert given not in result.stdout + result.stderr
            user = await card.connect("alice")
            assert (await command(card, *server)).returncode == ExitCode.UNAVAILABLE  # somebody else has the card
            await user.close()
            done = await command(card, *server, "--identity", "alice", "--mtu", "200")
            assert done.returncode == 0, done.stderr
            assert "the keys of card and server are the same" in done.stdout


@pytest.mark.parametrize(
    "words", [("--tls", "1.1"), ("--radius", "127.0.0.1:0"), ("--radius", ""), ("--radius", "a:b"), ("--mtu", "63")]
)
def test_wrong_arguments(tmp_path: Path, words: tuple[str, str]) -> None:
    secret = secret_in(tmp_path / "secret", SECRET)
    given = ("authenticate", "--config", "none", "--radius", "127.0.0.1", "--secret-file", secret, *words)
    assert CliRunner().invoke(app, given).exit_code == ExitCode.USAGE


def test_a_secret_that_is_short_or_open_to_others(tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text('socket = "s"\nstore = "c"\n[store_key]\nfile = "k"\n')
    words = ("authenticate", "--config", str(tmp_path / "card.toml"), "--radius", "[::1]:1812", "--secret-file")
    short = secret_in(tmp_path / "short", b"short")
    assert isinstance(CliRunner().invoke(app, (*words, short)).exception, RadiusSecretError)
    (tmp_path / "short").chmod(0o644)
    assert isinstance(CliRunner().invoke(app, (*words, short)).exception, UnsafeFileError)
