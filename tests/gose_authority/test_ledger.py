"""What the authority does is on record before anybody has it."""

from __future__ import annotations

import json
import os
import pwd
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gose.authority import AuthorityFolder, create_authority
from gose.authority.certificate_authority import AuthorityKey
from gose.authority.ledger import FILE, Action, AuthorityRecord, NotOnRecordError
from gose.authority.revocation import revoke_identity, revoke_token
from gose.registry import Registry
from secfunet.identity import Holder, Role, der_of, thumbprint
from secfunet.service.audit import AuditUnavailableError, anchor_path
from secfunet.service.audit_verify import verify
from secfunet.service.cli import ExitCode
from secfunet.vm_auth_token import unverified_claims
from tests.gose_authority.conftest import Gose
from tests.support.cards import running_card

NOW = 1_800_000_000.0


def log_of(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / FILE).read_bytes().splitlines()]


def acts(state: Path) -> list[tuple[str, str, str]]:
    return [(record["action"], record["decision"], record.get("name", "")) for record in log_of(state)]


@pytest.fixture
def made(tmp_path: Path) -> AuthorityFolder:
    return create_authority(tmp_path / "state" / "authority", ["localhost"], now=NOW)


@pytest.fixture
def registry(made: AuthorityFolder, key: AuthorityKey) -> Registry:
    registry = Registry(made.path.parent / "grid.sqlite", clock=lambda: NOW)
    for role, name in ((Role.VM, "web"), (Role.HYPERVISOR, "xen-1")):
        certificate = made.certificate_authority.issue(Holder(role, name), key.public_key(), now=NOW, valid=86400)
        issued = der_of(certificate)
        registry.begin_enrolment(role, name, thumbprint(issued), issued, None, NOW + 86400)
        registry.finish_enrolment(thumbprint(issued))
    return registry


@pytest.fixture(scope="module")
def key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def token(made: AuthorityFolder, registry: Registry) -> str:
    return made.token_authority.issue(
        registry, vm="web", hypervisor="xen-1", audience="https://localhost", now=NOW, valid=60
    )


def test_a_token_is_on_record_with_who_made_it(made: AuthorityFolder, registry: Registry) -> None:
    claims = unverified_claims(token(made, registry))
    record = log_of(made.path.parent)[-1]
    assert {
        name: record[name] for name in ("action", "decision", "name", "hypervisor", "jti", "thumbprint", "until")
    } == {
        "action": "token.issue",
        "decision": "permitted",
        "name": "web",
        "hypervisor": "xen-1",
        "jti": claims.jti,
        "thumbprint": claims.vmid,
        "until": int(NOW) + 60,
    }
    assert record["actor"]["uid"] == os.getuid()
    assert record["actor"]["user"] == pwd.getpwuid(os.getuid()).pw_name
    assert verify([made.path.parent / FILE], anchor_of=made.path.parent / FILE).sound


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)


def test_without_a_record_there_is_no_right(
    made: AuthorityFolder, registry: Registry, key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)
    with pytest.raises(AuditUnavailableError, match="not on record"):
        token(made, registry)
    assert registry.tokens() == ()
    with pytest.raises(AuditUnavailableError):
        made.certificate_authority.issue(Holder(Role.VM, "db"), key.public_key(), now=NOW, valid=60)


def test_taking_a_right_away_needs_no_record_and_says_that_there_is_none(
    made: AuthorityFolder, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    jti = unverified_claims(token(made, registry)).jti
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(NotOnRecordError, match="it is done"):
            revoke_token(registry, made.ledger, jti)
        with pytest.raises(NotOnRecordError):
            revoke_identity(registry, made.ledger, Role.VM, "web")
    assert registry.is_token_revoked(jti)
    assert registry.named(Role.VM, "web").is_revoked
    revoke_identity(registry, made.ledger, Role.VM, "web")
    assert acts(made.path.parent)[-1] == ("revoke", "permitted", "web")


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (sqlite3.OperationalError("database is locked"), "database is locked"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_what_is_permitted_and_not_done_is_on_record_as_failed(
    made: AuthorityFolder, error: BaseException, detail: str
) -> None:
    record = AuthorityRecord(Action.REVOKE, "permitted", role=Role.VM, name="web")
    with pytest.raises(type(error)), made.ledger.taking_away(record):
        raise error
    assert acts(made.path.parent)[-2:] == [("revoke", "permitted", "web"), ("revoke", "failed", "web")]
    assert log_of(made.path.parent)[-1]["detail"] == detail


def test_every_command_that_gives_or_takes_is_on_record(gose: Gose, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert gose("init").returncode == 0
    assert gose("renew-servers").returncode == 0
    assert gose("user", "token-authority", "--out", str(tmp_path / "u.pem")).returncode == 0
    assert gose("issue-token", "--vm", "web", "--hypervisor", "xen-1").returncode == ExitCode.DATA
    assert gose("revoke", "vm", "web").returncode == ExitCode.DATA
    assert acts(state) == [
        ("authority.init", "permitted", ""),
        ("certificate.issue", "permitted", "service-provider"),
        ("certificate.issue", "permitted", "openid-provider"),
        ("user-token.authority", "permitted", ""),
        ("token.issue", "failed", "web"),
        ("revoke", "permitted", "web"),
        ("revoke", "failed", "web"),
    ]
    done = gose("audit", "verify")
    assert (done.returncode, done.stdout.startswith("sound: 7 records (1 to 7")) == (0, True)
    log = state / FILE
    log.write_bytes(log.read_bytes().replace(b"openid-provider", b"openid-prowider", 1))
    assert gose("audit", "verify").returncode == ExitCode.DATA
    # The last record is whole: the commands go on, and the change stays visible.
    log.write_bytes(log.read_bytes()[:-2])
    anchor = json.loads(anchor_path(log).read_bytes())
    assert anchor["n"] == 7
    refused = gose("renew-servers")
    assert (refused.returncode, "record 7" in refused.stderr) == (ExitCode.DATA, True)


@pytest.mark.e2e
async def test_an_enrolment_is_on_record_with_its_card(gose: Gose, tmp_path: Path) -> None:
    async with running_card(tmp_path, name="vm") as card:
        (tmp_path / "gose.toml").write_text(
            f'[[secure_elements]]\nseid = "vm-1"\nsocket = "{card.socket}"\nrole = "vm"\n'
            f'user_pin_file = "{card.user_pin_file}"\nadministrator_keys_file = "{card.keys_file}"\n'
        )
        assert gose("init").returncode == 0
        out = tmp_path / "web.pem"
        done = gose("enrol-vm", "web", "--seid", "vm-1", "--key", "p-256", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert gose("enrol-vm", "web", "--seid", "vm-1", "--out", str(out)).returncode == ExitCode.REFUSED
        records = log_of(tmp_path / "state")[1:]
        assert [(r["action"], r["decision"], r["name"], r["seid"]) for r in records] == [
            ("certificate.issue", "permitted", "web", "vm-1"),
            ("enrol", "permitted", "web", "vm-1"),
            ("enrol", "failed", "web", "vm-1"),
        ]
        assert done.stdout.strip().endswith(records[1]["thumbprint"])


def test_commands_at_once_make_one_chain(gose: Gose, tmp_path: Path) -> None:
    assert gose("init").returncode == 0
    command = [sys.executable, "-m", "gose.cli", "renew-servers", "--config", str(tmp_path / "gose.toml")]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [one.wait(60) for one in running] == [0] * 4
    log = tmp_path / "state" / FILE
    verdict = verify([log], anchor_of=log)
    assert verdict.sound
    assert verdict.records == 9


USER, GROUP = 64123, 64124


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can work in another user's folder")
def test_what_root_does_to_a_grid_of_another_user_leaves_it_usable(gose: Gose, tmp_path: Path) -> None:
    """An administrator types the commands of the manual as root: the grid's own user must be able to read all of it afterwards."""
    os.chown(tmp_path, USER, GROUP)
    commands = [
        ("init",),
        ("renew-servers",),
        ("status",),
        ("user", "token-authority", "--out", "/dev/null"),
        ("revoke", "vm", "web"),
        ("issue-token", "--vm", "web", "--hypervisor", "xen-1"),
    ]
    for command in commands:
        gose(*command)
        strangers = [
            str(path) for path in tmp_path.rglob("*") if (path.lstat().st_uid, path.lstat().st_gid) != (USER, GROUP)
        ]
        assert strangers == [str(tmp_path / "gose.toml")], command


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can work in another user's folder")
def test_root_is_not_led_out_of_the_grids_folder(gose: Gose, tmp_path: Path) -> None:
    """Whoever has the grid's user plants links, and waits for an administrator."""
    state, target = tmp_path / "state", tmp_path / "etc"
    target.mkdir()
    assert gose("init").returncode == 0
    for path in (state, state / "authority"):
        os.chown(path, USER, GROUP)
    (state / "authority").rename(target / "authority")
    before = (target / "authority" / "service-provider.pem").read_bytes()
    os.chown(target / "authority", 0, 0)
    (state / "authority").symlink_to(target / "authority")
    os.chown(state / "authority", USER, GROUP, follow_symlinks=False)
    refused = gose("renew-servers")
    assert refused.returncode == ExitCode.CONFIG
    assert "symbolic link of another user" in refused.stderr
    assert (target / "authority" / "service-provider.pem").read_bytes() == before
