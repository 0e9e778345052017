"""Tokens and real processes: the commands from the authority to the card, kill -9 while the card takes a token, and a full disk."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from secfunet.apdu import ApduError, StatusError
from secfunet.card import CardError, KeyAlgorithm
from secfunet.card.tokens import CardTokens, TokenRefusedError
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.service.cli import ExitCode
from tests.secure_element.tokens import OAEP, TokenMaker
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority

MAKER = TokenMaker()
MEMORY_FAILURE = 0x6581


async def trusting(card: CardProcess) -> bytes:
    """Gives the card an identity, and an authority of tokens; returns its certificate."""
    certificate = await personalise(card, CertificateAuthority(), "alice", algorithm=KeyAlgorithm.RSA_2048)
    administrator = await card.administer()
    await CardTokens(administrator).trust(MAKER.public)
    await administrator.close()
    return certificate


async def test_kill_at_any_moment_leaves_token_and_counter_together(tmp_path: Path) -> None:
    """What was acknowledged is there and is refused when it comes again; what was not is there with its counter, or can be loaded again."""
    chance = random.Random(1312)  # noqa: S311 - moments, not secrets
    async with running_card(tmp_path) as card:
        key = rsa_key_of(load_certificate(await trusting(card)))
        acknowledged: list[int] = []
        number = killed = 0
        for _ in range(10):
            client = await card.connect("alice")
            tokens = CardTokens(client)

            async def load_many(tokens: CardTokens = tokens) -> None:
                nonlocal number
                while True:
                    number += 1
                    await tokens.load(MAKER.token(key, number, name=f"t{number % 8}", value=bytes(4000)), OAEP)
                    acknowledged.append(number)

            loading = asyncio.create_task(load_many())
            await asyncio.sleep(chance.uniform(0.02, 0.25))
            await card.kill()
            with pytest.raises((CardError, ApduError)):
                await loading
            killed += 1
            await client.close()
            await card.start()
            client = await card.connect("alice")
            tokens = CardTokens(client)
            kept = {one.name: one.counter for one in await tokens.stored()}
            last = max(kept.values(), default=0)
            assert last in (number, acknowledged[-1] if acknowledged else 0)
            administrator = await _authorities(card, client)
            assert administrator == last
            client = await card.connect("alice")
            tokens = CardTokens(client)
            if acknowledged:
                with pytest.raises(TokenRefusedError):
                    await tokens.load(MAKER.token(key, acknowledged[-1]), OAEP)
            if last < number:  # neither token nor counter: the very same container is still good
                await tokens.load(MAKER.token(key, number, name=f"t{number % 8}"), OAEP)
                acknowledged.append(number)
            await client.close()
        assert killed == 10
        assert len(acknowledged) > 10


async def _authorities(card: CardProcess, client: object) -> int:
    """The counter that the card keeps for its one authority; ``client`` gives the card back first."""
    await client.close()  # type: ignore[attr-defined]
    administrator = await card.administer()
    (authority,) = await CardTokens(administrator).authorities()
    await administrator.close()
    return authority.counter


async def test_a_full_disk_stores_no_token_and_burns_no_container(tmp_path: Path) -> None:
    async with running_card(tmp_path) as card:
        key = rsa_key_of(load_certificate(await trusting(card)))
        client = await card.connect("alice")
        tokens = CardTokens(client)
        container = MAKER.token(key, 1)
        before = (tmp_path / "card.store").read_bytes()
        assert card.process is not None
        resource.prlimit(card.process.pid, resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        with pytest.raises(StatusError) as refused:
            await tokens.load(container, OAEP)
        assert refused.value.sw == MEMORY_FAILURE
        assert await tokens.stored() == ()
        assert (tmp_path / "card.store").read_bytes() == before
        resource.prlimit(card.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await tokens.load(container, OAEP)
        assert await tokens.value("badge") == b"the token"
        await client.close()


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    module = {"gose": "gose.cli", "secure-element": "secure_element.cli"}[program]
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        check=False,
        cwd=folder,
        timeout=60,
        env={**os.environ, "GOSE_CONFIG": "gose.toml"},
    )


@pytest.mark.e2e
async def test_from_the_authority_into_the_card(tmp_path: Path) -> None:
    """A user's card is certified, trusts the authority, and takes, shows and forgets a token, by commands alone."""
    (tmp_path / "gose.toml").touch()
    value = bytes(range(256)) * 2
    (tmp_path / "value").touch(0o600)
    (tmp_path / "value").write_bytes(value)
    async with running_card(tmp_path) as card:

        def gose(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            return run(tmp_path, "gose", *arguments)

        def element(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            return run(tmp_path, "secure-element", *arguments, "--config", str(card.config))

        def token(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            return element("token", *arguments, "--user-pin-file", str(card.user_pin_file))

        def done(result: subprocess.CompletedProcess[bytes]) -> bytes:
            assert result.returncode == 0, result.stderr.decode()
            return result.stdout

        keys = ("--administrator-keys-file", str(card.keys_file))
        done(gose("init"))
        done(element("request", "alice", "--out", "alice.csr", "--identity", "alice", *keys))
        done(gose("user", "sign", "alice", "--request", "alice.csr", "--out", "alice.pem"))
        authority = str(tmp_path / "state" / "authority" / "ca.pem")
        done(element("install", "--certificate", "alice.pem", "--authority", authority, "--identity", "alice", *keys))
        done(gose("user", "token-authority", "--out", "tokens.pem"))
        issue = ("user", "issue-token", "badge", "--certificate", "alice.pem", "--value-file", "value")
        done(gose(*issue, "--out", "first"))
        assert value not in (tmp_path / "first").read_bytes()
        load = ("load", "first", "--identity", "alice")
        refused = token(*load)
        assert refused.returncode == ExitCode.REFUSED
        assert b"the card refuses this token" in refused.stderr
        done(element("token", "trust", "tokens.pem", *keys))
        done(token(*load))
        assert token(*load).returncode == ExitCode.REFUSED
        (listed,) = json.loads(done(token("list", "--json")))
        assert (listed["name"], listed["size"]) == ("badge", 512)
        assert done(token("list")).startswith(b"badge: 512 bytes, counter ")
        assert done(token("read", "badge")) == value
        done(token("read", "badge", "--out", "copy"))
        assert (tmp_path / "copy").read_bytes() == value
        assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
        assert f"counter {listed['counter']}".encode() in done(element("token", "authorities", *keys))
        done(token("delete", "badge"))
        assert token("read", "badge").returncode == ExitCode.DATA
        assert json.loads(done(token("list", "--json"))) == []
        (tmp_path / "gose.toml").write_text('container_profile = "pkcs1-v1_5"\n')
        done(gose(*issue, "--out", "second"))
        done(element("token", "distrust", "tokens.pem", *keys))
        second = ("load", "second", "--profile", "pkcs1-v1_5")
        assert token(*second).returncode == ExitCode.REFUSED
        assert element("token", "distrust", "tokens.pem", *keys).returncode == ExitCode.DATA
        done(element("token", "trust", "tokens.pem", *keys))
        assert token("load", "second").returncode == ExitCode.REFUSED
        done(token(*second))
        assert token("load", "value", "--profile", "none").returncode == ExitCode.USAGE
        assert element("token", "trust", "alice.pem", *keys).returncode == ExitCode.DATA
