"""The commands as processes: what they print, what they write, and how they end."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from gose.authority import AuthorityFolder
from gose.commands.options import parse_duration
from gose.registry import Registry
from secfunet.identity import Holder, Role, load_certificate, role_of, thumbprint
from secfunet.service.cli import ExitCode
from secfunet.vm_auth_token import TokenVerifier, unverified_claims
from tests.gose_authority.conftest import Gose
from tests.support.cards import running_card


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), ("365d", 31536000)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "0h", "-1h", "1.5h", "1w", "8 h", "٨h"])
def test_other_durations_are_usage_errors(text: str) -> None:
    with pytest.raises(Exception, match="a duration is"):
        parse_duration(text)


def test_init_once(gose: Gose, tmp_path: Path) -> None:
    before = gose("status")
    assert (before.returncode, before.stdout) == (ExitCode.CONFIG, "")
    assert "gose init" in before.stderr
    assert gose("init").returncode == 0
    ca = (tmp_path / "state" / "authority" / "ca.pem").read_bytes()
    again = gose("init")
    assert again.returncode == ExitCode.REFUSED
    assert "never overwritten" in again.stderr
    assert (tmp_path / "state" / "authority" / "ca.pem").read_bytes() == ca
    assert gose("renew-servers").returncode == 0


def test_wrong_arguments(gose: Gose) -> None:
    assert gose("init").returncode == 0
    assert gose("issue-token", "--vm", "a", "--hypervisor", "b").returncode == ExitCode.DATA
    assert gose("issue-token", "--vm", "a", "--hypervisor", "b", "--valid", "1w").returncode == ExitCode.USAGE
    assert gose("issue-token", "--vm", "a", "--hypervisor", "b", "--operations", "export").returncode == ExitCode.USAGE
    unknown = gose("revoke", "token", "unknown")
    assert (unknown.returncode, unknown.stderr) == (ExitCode.DATA, "error: no token 'unknown' is in the registry\n")
    assert gose("revoke", "vm", "unknown").returncode == ExitCode.DATA
    assert gose("enrol-vm", "a", "--seid", "x", "--out", "y").returncode == ExitCode.DATA
    assert gose("enrol-vm", "a", "--seid", "x", "--out", "y", "--key", "dsa").returncode == ExitCode.USAGE


def test_a_damaged_registry_is_a_sentence(gose: Gose, tmp_path: Path) -> None:
    assert gose("init").returncode == 0
    for path in (tmp_path / "state").glob("grid.sqlite*"):
        path.write_bytes(b"no database" * 1000)
    done = gose("status")
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
async def test_an_administrators_day(gose: Gose, tmp_path: Path) -> None:
    folder = tmp_path / "cards"
    folder.mkdir()
    async with running_card(folder, name="vm") as vm, running_card(folder, name="server") as server:
        elements = "".join(
            f'[[secure_elements]]\nseid = "{role}-1"\nsocket = "{card.socket}"\nrole = "{role}"\n'
            f'user_pin_file = "{card.user_pin_file}"\nadministrator_keys_file = "{card.keys_file}"\n'
            for role, card in (("vm", vm), ("server", server))
        )
        (tmp_path / "gose.toml").write_text(
            elements + '[[secure_elements]]\nseid = "gone"\nsocket = "gone.sock"\nrole = "vm"\nuser_pin_file = "x"\n'
        )
        async with running_card(folder, name="host") as host:
            assert gose("init").returncode == 0
            options = ("--card", str(host.socket), "--administrator-keys-file", str(host.keys_file))
            host_pem, vm_pem = tmp_path / "host.pem", tmp_path / "vm.pem"
            done = gose("enrol-hypervisor", "host", *options, "--out", str(host_pem))
            assert done.returncode == 0, done.stderr
            assert gose("enrol-hypervisor", "host", *options, "--out", str(host_pem)).returncode == ExitCode.REFUSED
        done = gose("enrol-vm", "web", "--seid", "vm-1", "--key", "p-256", "--out", str(vm_pem))
        assert done.returncode == 0, done.stderr
        assert gose("enrol-server", "login", "--seid", "server-1", "--key", "p-256").returncode == 0
        assert gose("enrol-server", "login", "--seid", "vm-1").returncode == ExitCode.DATA
        wrong = gose("enrol-vm", "web2", "--seid", "gone", "--out", str(vm_pem))
        assert wrong.returncode == ExitCode.FAILED
        assert "administrator_keys_file" in wrong.stderr

        printed = gose("issue-token", "--vm", "web", "--hypervisor", "host", "--operations", "sign", "--valid", "1h")
        claims = unverified_claims(printed.stdout.strip())
        authority = AuthorityFolder(tmp_path / "state" / "authority")
        vmid = thumbprint(_der(vm_pem))
        hvid = thumbprint(_der(host_pem))
        verifier = TokenVerifier(authority.token_issuer, "https://localhost:8443", authority.token_keys)
        with Registry(tmp_path / "state" / "grid.sqlite") as running_grid:
            revoked = running_grid.is_token_revoked
            token = verifier.verify(printed.stdout.strip(), vmid=vmid, hvid=hvid, now=time.time(), is_revoked=revoked)
            assert token.operations == {"sign"}
            assert token.expires_at - token.issued_at == 3600
            file = tmp_path / "token"
            written = gose("issue-token", "--vm", "web", "--hypervisor", "host", "--out", str(file), "--json")
            assert json.loads(written.stdout)["jti"] == unverified_claims(file.read_text().strip()).jti
            assert stat.S_IMODE(file.stat().st_mode) == 0o600

            report = json.loads(gose("status", "--json").stdout)
            states = {card["seid"]: (card["state"], card["holder"]) for card in report["secure_elements"]}
            assert states == {"vm-1": ("answers", "web"), "server-1": ("answers", "login"), "gone": ("gone", None)}
            assert [entry["thumbprint"] for entry in report["hypervisors"]] == [hvid]
            assert {entry["jti"] for entry in report["tokens"]} > {claims.jti}
            held = await vm.connect()
            text = gose("status").stdout
            await held.close()
            assert "in use" in text
            assert claims.jti in text

            assert gose("revoke", "token", claims.jti).returncode == 0
            assert revoked(claims.jti)
            assert gose("revoke", "vm", "web").returncode == 0
            assert running_grid.is_identity_revoked(Role.VM, vmid)
            assert gose("revoke", "hypervisor", "host").returncode == 0
            assert running_grid.is_identity_revoked(Role.HYPERVISOR, hvid)
        assert gose("issue-token", "--vm", "web", "--hypervisor", "host").returncode == ExitCode.REFUSED
        assert "revoked" in gose("status").stdout


@pytest.mark.e2e
async def test_all_cards_of_the_settings_are_enrolled_and_a_lost_one_anew(gose: Gose, tmp_path: Path) -> None:
    """The card of a VM is lost and its name revoked: only who says --replace gives the name another key."""
    folder, out = tmp_path / "cards", tmp_path / "certificates"
    folder.mkdir()
    everything = ("enrol-cards", "--key", "p-256", "--out", str(out))
    async with running_card(folder, name="web") as web, running_card(folder, name="login") as login:
        (tmp_path / "gose.toml").write_text(
            "".join(
                f'[[secure_elements]]\nseid = "{name}"\nsocket = "{card.socket}"\nrole = "{role}"\n'
                f'user_pin_file = "{card.user_pin_file}"\nadministrator_keys_file = "{card.keys_file}"\n'
                for name, role, card in (("web", "vm", web), ("login", "server", login))
            )
        )
        assert gose("init").returncode == 0
        out.mkdir(mode=0o700)
        assert gose(*everything).returncode == 0
        first = {path.name: path.read_bytes() for path in out.iterdir()}
        assert sorted(first) == ["login.pem", "web.pem"]
        assert gose(*everything).returncode == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == first

        assert gose("revoke", "vm", "web").returncode == 0
        (out / "web.pem").unlink()
        refused = gose(*everything)
        assert (refused.returncode, sorted(path.name for path in out.iterdir())) == (ExitCode.REFUSED, ["login.pem"])
        assert "--replace" in refused.stderr
        unknown = gose(*everything, "--replace", "db")
        assert (unknown.returncode, "no secure element 'db'" in unknown.stderr) == (ExitCode.USAGE, True)
        assert gose(*everything, "--replace", "web").returncode == 0
        assert (out / "login.pem").read_bytes() == first["login.pem"]
        old, new = load_certificate(first["web.pem"]), load_certificate((out / "web.pem").read_bytes())
        assert role_of(new) == role_of(old) == Holder(Role.VM, "web")
        assert new.public_key() != old.public_key()


def _der(path: Path) -> bytes:
    certificate = load_certificate(path.read_bytes())
    assert role_of(certificate)
    from secfunet.identity import der_of

    return der_of(certificate)
