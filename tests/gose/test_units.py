"""The parts of the grid that need neither a card nor a connection."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from gose.answers import AnswerStore, Question, scope_of
from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.openid_provider.sign_on import SignOns
from gose.openid_provider.store import SqliteOpenIdStore
from gose.service_provider.card_errors import STATUS_WORDS, refusal_of
from gose.sessions import SessionStore
from gose.settings import Address, GoseSettings, Limits, origin, parse_address
from gose.single_use import RateLimit, SingleUse
from gose.slots.errors import CardUnavailableError, SlotBusyError, SlotClosedError, SlotDeadlineError
from gose.slots.queue import JobQueue
from gose.state import open_database
from secfunet.apdu import StatusError
from secfunet.card.errors import CardGoneError
from secfunet.openid.association import Association, AssociationKind, AssociationType
from secfunet.openid.store import MemoryStore, OpenIdStore
from secfunet.service.settings import SettingsError, validate_settings


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_database(tmp_path / "state.sqlite", "")) as database:
        yield database


# --- sessions


class Everybody:
    """Everybody is in good standing, but for those who are named."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()

    def check(self, *, vmid: str, hvid: str, token_id: str) -> None:
        if self.revoked & {vmid, hvid, token_id}:
            raise Refusal(Reason.TOKEN_REFUSED, "revoked")


def store_of(
    database: sqlite3.Connection, clock: Clock, standing: Everybody | None = None, **limits: float
) -> SessionStore:
    return SessionStore(database, standing or Everybody(), Limits.model_validate(limits), Metrics(), clock=clock)


def grant(
    store: SessionStore,
    clock: Clock,
    *,
    vmid: str = "vm",
    hvid: str = "hv",
    lifetime: float = 100.0,
    issued_at: float | None = None,
) -> str:
    secret, _ = store.grant(
        vmid=vmid,
        hvid=hvid,
        seid="se",
        token_id="jti",
        operations=["sign"],
        token_issued_at=clock.now if issued_at is None else issued_at,
        token_expires_at=clock.now + lifetime,
    )
    return secret


def reason(caught: pytest.ExceptionInfo[Refusal]) -> Reason:
    return caught.value.reason


def test_a_session_ends_with_its_token_or_its_lifetime(database: sqlite3.Connection, clock: Clock) -> None:
    store = store_of(database, clock, session_lifetime=1000)
    short, long = store.find(grant(store, clock, lifetime=10)), store.find(grant(store, clock, lifetime=10_000))
    assert (short.expires_at - clock.now, long.expires_at - clock.now) == (10, 1000)
    store.check(short, "hv")
    clock.now += 10
    with pytest.raises(Refusal) as caught:
        store.check(short, "hv")
    assert reason(caught) is Reason.SESSION_EXPIRED
    store.check(long, "hv")


def test_a_session_is_its_hypervisors(database: sqlite3.Connection, clock: Clock) -> None:
    store = store_of(database, clock)
    session = store.find(grant(store, clock))
    with pytest.raises(Refusal) as caught:
        store.check(session, "another")
    assert reason(caught) is Reason.HYPERVISOR_MISMATCH
    store.check(session, "hv")


def test_a_revocation_ends_a_session_for_good(database: sqlite3.Connection, clock: Clock) -> None:
    standing = Everybody()
    store = store_of(database, clock, standing)
    secret = grant(store, clock)
    session = store.find(secret)
    standing.revoked.add("jti")
    with pytest.raises(Refusal) as caught:
        store.check(session, "hv")
    assert reason(caught) is Reason.TOKEN_REFUSED
    standing.revoked.clear()
    with pytest.raises(Refusal) as caught:
        store.check(session, "hv")
    assert reason(caught) is Reason.SESSION_UNKNOWN
    with pytest.raises(Refusal):
        store.find(secret)


def test_a_restart_keeps_sessions_and_no_secret(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "state.sqlite"
    with contextlib.closing(open_database(path, "")) as database:
        store = store_of(database, clock)
        secret, ended = grant(store, clock), grant(store, clock, lifetime=5)
        first = store.find(secret)
        assert secret.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert secret not in repr(first)
    clock.now += 6
    with contextlib.closing(open_database(path, "")) as database:
        store = store_of(database, clock)
        again = store.find(secret)
        assert (again.vmid, again.hvid, again.seid, again.operations) == ("vm", "hv", "se", frozenset({"sign"}))
        assert again.expires_at == first.expires_at
        with pytest.raises(Refusal):
            store.find(ended)
        store.close(again)
    with contextlib.closing(open_database(path, "")) as database, pytest.raises(Refusal):
        store_of(database, clock).find(secret)


def test_sessions_are_bounded(database: sqlite3.Connection, clock: Clock) -> None:
    store = store_of(database, clock, sessions_per_vm=2, sessions_per_hypervisor=3)
    oldest = grant(store, clock)
    clock.now += 1
    kept = [grant(store, clock) for _ in range(2)]
    with pytest.raises(Refusal):
        store.find(oldest)
    for secret in kept:
        store.find(secret)
    grant(store, clock, vmid="vm-2")
    with pytest.raises(Refusal) as caught:
        grant(store, clock, vmid="vm-3")
    assert reason(caught) is Reason.TOO_MANY_SESSIONS
    grant(store, clock, vmid="vm-3", hvid="hv-2")
    clock.now += 1000
    grant(store, clock, vmid="vm-3")
    assert len(store) == 1


def test_a_vm_is_where_the_newest_token_that_was_used_says(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "state.sqlite"
    with contextlib.closing(open_database(path, "")) as database:
        store = store_of(database, clock)
        here, neighbour = grant(store, clock, issued_at=10), grant(store, clock, vmid="vm-2", issued_at=10)
        again = grant(store, clock, issued_at=9)  # of two tokens for one hypervisor either may be used
        there = grant(store, clock, hvid="hv-2", issued_at=11)
        for secret in (here, again):
            with pytest.raises(Refusal) as caught:
                store.find(secret)
            assert reason(caught) is Reason.SESSION_UNKNOWN
        store.check(store.find(there), "hv-2")
        store.check(store.find(neighbour), "hv")
        # An older token takes nothing back: not one for the first hypervisor, nor what comes after one for the second.
        grant(store, clock, hvid="hv-2", issued_at=5)
        for issued_at in (10, 11):
            with pytest.raises(Refusal) as caught:
                grant(store, clock, issued_at=issued_at)
            assert reason(caught) is Reason.VM_ELSEWHERE
        store.check(store.find(there), "hv-2")
        store.close(store.find(there))
    with contextlib.closing(open_database(path, "")) as database:
        store = store_of(database, clock)
        # Neither the end of its sessions nor a restart of the grid puts it back.
        with pytest.raises(Refusal) as caught:
            grant(store, clock, issued_at=10)
        assert reason(caught) is Reason.VM_ELSEWHERE
        # And nothing keeps it away for ever.
        store.check(store.find(grant(store, clock, issued_at=12)), "hv")


def test_a_refused_session_moves_nothing(database: sqlite3.Connection, clock: Clock) -> None:
    store = store_of(database, clock, sessions_per_hypervisor=1)
    grant(store, clock, vmid="vm-2", hvid="hv-2", issued_at=1)
    here = grant(store, clock, issued_at=1)
    with pytest.raises(Refusal) as caught:
        grant(store, clock, hvid="hv-2", issued_at=2)
    assert reason(caught) is Reason.TOO_MANY_SESSIONS
    store.check(store.find(here), "hv")


@given(untrusted=st.text())
@settings(max_examples=50, deadline=None)
def test_any_secret_is_known_or_not(untrusted: str) -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        with pytest.raises(Refusal) as caught:
            store_of(database, Clock()).find(untrusted)
        assert reason(caught) is Reason.SESSION_UNKNOWN


# --- answers


def question() -> Question:
    return Question(secrets.token_bytes(16), secrets.token_bytes(32))


def test_answers_are_given_again(tmp_path: Path, clock: Clock) -> None:
    mine, others = scope_of("vm", "hv"), scope_of("vm", "other")
    one, two, unknown = question(), question(), question()
    with contextlib.closing(AnswerStore(tmp_path / "a.sqlite", keep=10, max_bytes=2**20, clock=clock)) as answers:
        answers.keep(mine, [one, two], b"container")
        assert answers.find(mine, [one, two, unknown]) == (
            {one.request_id: b"container", two.request_id: b"container"},
            set(),
        )
        assert answers.find(others, [one]) == ({}, set())
        assert answers.find(mine, [Question(one.request_id, two.request_digest)]) == ({}, {one.request_id})
    # The process is gone, the answers are not.
    with contextlib.closing(AnswerStore(tmp_path / "a.sqlite", keep=10, max_bytes=2**20, clock=clock)) as answers:
        assert answers.find(mine, [one])[0]
        clock.now += 11
        assert answers.find(mine, [one]) == ({}, set())
        answers.keep(mine, [Question(one.request_id, two.request_digest)], b"new")
        answers.maintain()
        assert answers.find(mine, [Question(one.request_id, two.request_digest)])[0] == {one.request_id: b"new"}
        assert answers.find(mine, [two]) == ({}, set())


def test_the_oldest_answers_make_room(tmp_path: Path, clock: Clock) -> None:
    scope = scope_of("vm", "hv")
    with contextlib.closing(AnswerStore(tmp_path / "a.sqlite", keep=1000, max_bytes=2**21, clock=clock)) as answers:
        questions = [question() for _ in range(600)]
        for number, one in enumerate(questions):
            answers.keep(scope, [one], number.to_bytes(2) * 4096)
        answers.maintain()
        kept = [bool(answers.find(scope, [one])[0]) for one in questions]
        assert not kept[0]
        assert kept[-1]
        assert kept == sorted(kept), "the oldest went"
        assert sum(kept) * 8192 < 2**21


# --- single use, rates


def test_single_use(clock: Clock) -> None:
    waiting: SingleUse[str] = SingleUse(limit=3, lifetime=10, per_owner=2, clock=clock)
    one = waiting.put("one", owner="a")
    assert waiting.look(one) == "one"
    assert waiting.take(one) == "one"
    assert waiting.take(one) is None
    late = waiting.put("late", owner="a")
    clock.now += 10
    assert waiting.take(late) is None
    two = waiting.put("two", owner="a")
    waiting.put("three", owner="a")
    with pytest.raises(Refusal) as caught:
        waiting.put("four", owner="a")
    assert reason(caught) is Reason.TOO_MANY_LOGINS
    waiting.put("five", owner="b")
    waiting.put("six", owner="c")
    assert waiting.take(two) is None, "the oldest made room"
    assert len(waiting) == 3
    waiting.put("seven", owner="a")
    assert waiting.take("x" * 43) is None


def test_rates(clock: Clock) -> None:
    rate = RateLimit(limit=2, window=10, monotonic=clock)
    rate.spend("a")
    clock.now += 4
    rate.spend("a")
    with pytest.raises(Refusal) as caught:
        rate.spend("a")
    assert caught.value.retry_after == pytest.approx(1), "0.8 have come back in these four seconds"
    rate.spend("b")
    clock.now += 1.1
    rate.spend("a")


def test_sign_ons(database: sqlite3.Connection, clock: Clock) -> None:
    sign_ons = SignOns(database, lifetime=10, clock=clock)
    first = sign_ons.remember("hv")
    assert sign_ons.hypervisor(first) == "hv"
    second = sign_ons.remember("hv")
    assert sign_ons.hypervisor(first) is None
    assert SignOns(database, lifetime=10, clock=clock).hypervisor(second) == "hv", "a restart keeps it"
    clock.now += 10
    assert sign_ons.hypervisor(second) is None


# --- the OpenID store: the same rules as the one in memory


@pytest.fixture(params=["sqlite", "memory"])
def openid_store(request: pytest.FixtureRequest, database: sqlite3.Connection) -> OpenIdStore:
    if request.param == "memory":
        return MemoryStore(max_associations=3, max_nonces=3)
    return SqliteOpenIdStore(database, max_associations=3, max_nonces=3)


def association(handle: str, expires_at: float, kind: AssociationKind = AssociationKind.SHARED) -> Association:
    return Association(
        kind, "https://op.example/", handle, AssociationType.HMAC_SHA256, secrets.token_bytes(32), expires_at
    )


def test_associations_are_kept(openid_store: OpenIdStore) -> None:
    endpoint, shared = "https://op.example/", AssociationKind.SHARED
    one, two = association("one", 100), association("two", 200)
    openid_store.save_association(one)
    openid_store.save_association(two)
    assert openid_store.find_association(shared, endpoint, "one", 50) == one
    assert openid_store.find_association(shared, endpoint, None, 50) == two
    assert openid_store.find_association(shared, endpoint, "one", 100) is None
    assert openid_store.find_association(AssociationKind.PRIVATE, endpoint, "one", 50) is None
    assert openid_store.find_association(shared, "https://other.example/", "one", 50) is None
    assert openid_store.remove_association(shared, endpoint, "one")
    assert not openid_store.remove_association(shared, endpoint, "one")
    openid_store.save_association(association("of-another-kind", 100, AssociationKind.RELYING))
    for number in range(3):
        openid_store.save_association(association(str(number), 100))
    assert openid_store.find_association(shared, endpoint, "two", 50) is None, "the first of its kind made room"
    assert openid_store.find_association(AssociationKind.RELYING, endpoint, None, 50) is not None
    renewed = association("2", 300)
    openid_store.save_association(renewed)
    assert openid_store.find_association(shared, endpoint, "2", 50) == renewed


def test_nonces_serve_once(openid_store: OpenIdStore) -> None:
    assert openid_store.use_nonce("https://op.example/", "n", 100, 50)
    assert not openid_store.use_nonce("https://op.example/", "n", 100, 60)
    assert openid_store.use_nonce("https://other.example/", "n", 100, 50)
    assert openid_store.use_nonce("https://op.example/", "m", 100, 50)
    assert not openid_store.use_nonce("https://op.example/", "full", 100, 50), "it cannot know"
    assert openid_store.use_nonce("https://op.example/", "later", 300, 200)


# --- the queue


async def test_the_queue_gives_a_wake_up_on() -> None:
    """A worker that is cancelled just when it was woken does not take the job's wake-up with it."""
    queue: JobQueue[None] = JobQueue("q", 4)
    first, second = (asyncio.create_task(queue.take(idle=5)) for _ in range(2))
    await asyncio.sleep(0)

    async def work(card: None) -> None:
        """Nothing."""

    queue.put(work, deadline=queue.monotonic() + 5)
    first.cancel()
    job = await asyncio.wait_for(second, 1)
    assert job is not None
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await queue.take(idle=0.01) is None


# --- what refusals look like


def test_what_is_for_the_log_does_not_leave_the_grid() -> None:
    for one in Reason:
        refusal = Refusal(one, "text", retry_after=1.5, detail="for the log")
        assert b"for the log" not in refusal.facts.status().SerializeToString()
        assert b"for the log" not in refusal.facts.failure().SerializeToString()


def test_what_a_card_says_has_a_reason() -> None:
    for sw, (expected, _) in STATUS_WORDS.items():
        refusal = refusal_of(StatusError(sw, 0x2A))
        assert refusal.reason is expected
        assert (refusal.retry_after is not None) == (expected is Reason.CARD_UNAVAILABLE)
    assert refusal_of(StatusError(0x6F42, 0x2A)).reason is Reason.CARD_REFUSED
    busy = refusal_of(SlotBusyError("se", 3, 0.25))
    assert (busy.reason, busy.code, busy.retry_after) == (Reason.SLOT_BUSY, StatusCode.RESOURCE_EXHAUSTED, 0.25)
    assert refusal_of(SlotDeadlineError("se")).code is StatusCode.DEADLINE_EXCEEDED
    assert refusal_of(SlotClosedError("se")).reason is Reason.SHUTTING_DOWN
    assert refusal_of(CardUnavailableError("se", "gone", 0.5)).code is StatusCode.UNAVAILABLE
    assert refusal_of(CardGoneError("gone")).reason is Reason.CARD_UNAVAILABLE


# --- settings


def test_settings_beside_their_file(tmp_path: Path) -> None:
    found = validate_settings(
        GoseSettings,
        {
            "service_provider": {"https": "[::1]:443"},
            "secure_elements": [{"seid": "a", "socket": "a.sock", "role": "vm", "user_pin_file": "/etc/pin"}],
        },
        tmp_path / "gose.toml",
    )
    assert found.state == tmp_path / "state"
    assert found.secure_elements[0].socket == tmp_path / "a.sock"
    assert str(found.secure_elements[0].user_pin_file) == "/etc/pin"
    assert found.secure_elements[0].label == "vm"
    assert found.service_provider.https == Address("::1", 443)
    assert str(found.service_provider.https) == "[::1]:443"
    assert found.audience == "https://localhost"
    assert origin("::1", 8443) == "https://[::1]:8443"


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"limits": {"slot_que": 1}}, "slot_queue"),
        ({"limits": {"slot_queue": 0}}, "limits.slot_queue"),
        ({"service_provider": {"grpc": "localhost"}}, "host:port"),
        ({"service_provider": {"grpc": "::1:80"}}, r"\[address\]:port"),
        ({"secure_elements": [{"seid": "a", "socket": "s", "role": "x", "user_pin_file": "p"}]}, "role"),
        (
            {"secure_elements": [{"seid": "a", "socket": s, "role": "vm", "user_pin_file": "p"} for s in "st"]},
            "same seid",
        ),
        (
            {"secure_elements": [{"seid": "a", "role": "vm", "user_pin_file": "p"}]},
            "either a 'socket' or 'pcsc' or 'racs'",
        ),
        (
            {"secure_elements": [{"seid": "a", "role": "vm", "user_pin_file": "p", "racs": {"address": "b:7777"}}]},
            "need the table 'racs'",
        ),
        (
            {
                "racs": {"key": "k", "certificate": "c"},
                "secure_elements": [
                    {"seid": s, "role": "vm", "user_pin_file": "p", "racs": {"address": "b:7777", "seid": "x"}}
                    for s in "st"
                ],
            },
            "same place",
        ),
    ],
)
def test_settings_that_are_refused(raw: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        validate_settings(GoseSettings, raw, Path("/gose.toml"))


@given(st.text())
def test_addresses_are_parsed_or_refused(untrusted: str) -> None:
    try:
        address = parse_address(untrusted)
    except ValueError:
        return
    assert isinstance(address, Address)
    assert 0 <= address.port <= 65535
    assert parse_address(str(address)) == address
