"""The registry: what is enrolled where, and revocations that another process sees at once."""

from __future__ import annotations

import multiprocessing
import stat
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gose.registry import TOKENS_KEPT, NotEnrolledError, Registry, RevocationKind, State
from secfunet.identity import Role


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "grid.sqlite", clock=lambda: 1000.0) as opened:
        yield opened


def enrol(registry: Registry, role: Role, name: str, thumbprint: str, seid: str | None = None) -> None:
    registry.begin_enrolment(role, name, thumbprint, b"der " + thumbprint.encode(), seid, 5000.0)
    registry.finish_enrolment(thumbprint)


def test_an_identity_is_active_when_its_enrolment_is_finished(registry: Registry) -> None:
    registry.begin_enrolment(Role.VM, "web", "T1", b"der", "se-1", 5000.0)
    assert registry.find_vm("T1") is None
    pending = registry.pending(Role.VM, "web")
    assert pending is not None
    assert pending.state is State.PENDING
    identity = registry.finish_enrolment("T1")
    assert identity == registry.find_vm("T1") == registry.named(Role.VM, "web") == registry.in_secure_element("se-1")
    assert (identity.seid, identity.certificate, identity.recorded_at, identity.expires_at) == (
        "se-1",
        b"der",
        1000,
        5000,
    )
    assert not identity.is_revoked
    assert registry.pending(Role.VM, "web") is None
    assert registry.find_hypervisor("T1") is None
    with pytest.raises(NotEnrolledError):
        registry.finish_enrolment("T1")


def test_names_and_secure_elements_have_one_holder(registry: Registry) -> None:
    enrol(registry, Role.VM, "web", "T1", "se-1")
    enrol(registry, Role.VM, "web", "T2", "se-2")  # the name moves to another card
    assert registry.find_vm("T1") is None
    assert registry.in_secure_element("se-1") is None
    enrol(registry, Role.VM, "mail", "T3", "se-2")  # the card moves to another name
    assert registry.find_vm("T2") is None
    with pytest.raises(NotEnrolledError):
        registry.named(Role.VM, "web")
    enrol(registry, Role.HYPERVISOR, "mail", "T4")  # another role has names of its own
    enrol(registry, Role.HYPERVISOR, "h2", "T5")  # cards elsewhere do not collide
    assert [identity.name for identity in registry.identities(Role.HYPERVISOR)] == ["h2", "mail"]
    assert registry.find_vm("T3") is not None


def test_a_second_pending_enrolment_takes_the_place_of_the_first(registry: Registry) -> None:
    for thumbprint in ("T1", "T2"):
        registry.begin_enrolment(Role.VM, "web", thumbprint, b"", None, 5000.0)
    pending = registry.pending(Role.VM, "web")
    assert pending is not None
    assert pending.thumbprint == "T2"
    with pytest.raises(NotEnrolledError):
        registry.finish_enrolment("T1")


def test_revoking_a_name_revokes_all_that_it_had(registry: Registry) -> None:
    enrol(registry, Role.VM, "web", "T1")
    enrol(registry, Role.VM, "web", "T2")
    assert [revocation.value for revocation in registry.revoke_identity(Role.VM, "web")] == ["T1", "T2"]
    assert registry.is_identity_revoked(Role.VM, "T1")
    assert registry.named(Role.VM, "web").is_revoked
    again = registry.revoke_identity(Role.VM, "web")
    assert [revocation.sequence for revocation in again] == [1, 2]
    enrol(registry, Role.VM, "web", "T3")
    assert not registry.named(Role.VM, "web").is_revoked
    with pytest.raises(NotEnrolledError):
        registry.revoke_identity(Role.HYPERVISOR, "web")


def test_each_kind_of_revocation_touches_a_session(registry: Registry) -> None:
    enrol(registry, Role.VM, "web", "V")
    enrol(registry, Role.HYPERVISOR, "host", "H")
    registry.record_token("j", "V", "H", frozenset({"sign"}), 1000, 2000)
    registry.record_token("other", "V", "H", frozenset({"sign"}), 1000, 2000)
    registry.revoke_token("other")
    assert registry.revocation_of(vmid="V", hvid="H", jti="j") is None
    registry.revoke_token("j")
    found = registry.revocation_of(vmid="V", hvid="H", jti="j")
    assert found is not None
    assert found.kind is RevocationKind.TOKEN
    registry.revoke_identity(Role.VM, "web")
    registry.revoke_identity(Role.HYPERVISOR, "host")
    for vmid, hvid, kind in (("V", "x", RevocationKind.VM), ("x", "H", RevocationKind.HYPERVISOR)):
        found = registry.revocation_of(vmid=vmid, hvid=hvid, jti="x")
        assert found is not None
        assert found.kind is kind
    assert (
        registry.revocation_of(vmid="H", hvid="V", jti="V") is None
    )  # a thumbprint revoked as one thing is that thing
    assert [revocation.sequence for revocation in registry.revocations(after=1)] == [2, 3, 4]
    assert registry.last_revocation() == 4


def test_tokens_are_on_record_and_forgotten_long_after_their_end(tmp_path: Path) -> None:
    now = [1000.0]
    with Registry(tmp_path / "g.sqlite", clock=lambda: now[0]) as registry:
        registry.record_token("a", "V", "H", frozenset({"sign", "encrypt"}), 1000, 2000)
        registry.revoke_token("a")
        (token,) = registry.tokens()
        assert token.operations == {"sign", "encrypt"}
        assert token.revoked_at == 1000
        assert registry.tokens(unexpired_at=2000) == ()
        now[0] = 2000 + TOKENS_KEPT + 1
        registry.record_token("b", "V", "H", frozenset({"sign"}), now[0], now[0] + 10)
        assert [token.jti for token in registry.tokens()] == ["b"]
        assert not registry.is_token_revoked("a")
        with pytest.raises(NotEnrolledError):
            registry.revoke_token("a")


def test_a_token_recorded_later_is_the_newer_one(registry: Registry) -> None:
    """Also within a second, or after the clock was put back."""
    for jti, hvid, now in (("a", "H1", 1000.5), ("b", "H2", 1000.5), ("c", "H1", 10.0)):
        registry.record_token(jti, "V", hvid, frozenset({"sign"}), now, 2000)
    registry.record_token("d", "V2", "H1", frozenset({"sign"}), 10.0, 2000)
    issued = [registry.token(jti) for jti in "abcd"]
    times = [token.issued_at for token in issued if token is not None]
    assert times[0] == 1000.5 < times[1] < times[2] < 1000.6
    assert times[3] == 10.0


def test_the_file_is_private(registry: Registry, tmp_path: Path) -> None:
    enrol(registry, Role.VM, "web", "T1")
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def _watch(path: Path, pipe: Connection) -> None:
    """A running grid: opened before anything was revoked, asked again and again."""
    with Registry(path) as registry:
        while pipe.recv():
            pipe.send(registry.revocation_of(vmid="V", hvid="H", jti="j") is not None)


def test_a_revocation_is_seen_at_once_by_a_grid_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "grid.sqlite"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    grid = context.Process(target=_watch, args=(path, there))
    grid.start()
    try:
        with Registry(path) as registry:
            registry.record_token("j", "V", "H", frozenset({"sign"}), 0, 9e9)
            here.send(True)
            assert here.recv() is False
            registry.revoke_token("j")
            here.send(True)
            assert here.recv() is True
    finally:
        here.send(False)
        grid.join(10)
        assert grid.exitcode == 0


def test_threads_and_connections_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "grid.sqlite"
    errors: list[BaseException] = []
    with Registry(path) as one, Registry(path) as two:

        def work(registry: Registry, prefix: str) -> None:
            try:
                for number in range(15):
                    enrol(registry, Role.VM, f"{prefix}{number}", f"T{prefix}{number}", f"se-{number}")
                    registry.revoke_identity(Role.VM, f"{prefix}{number}")
            except BaseException as error:  # noqa: BLE001 - whatever it is, the test shall fail with it
                errors.append(error)

        threads = [
            threading.Thread(target=work, args=(registry, prefix))
            for registry, prefix in ((one, "a"), (one, "b"), (two, "c"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(one.revocations()) == len(two.revocations()) == 45
        assert len(two.identities(Role.VM)) == 15  # one holder a card
