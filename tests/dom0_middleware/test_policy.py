"""Policy: default deny, first match, rates, and a file with any fault refuses everything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dom0_middleware.errors import Reason, Refused
from dom0_middleware.initialise import EXAMPLE_POLICY
from dom0_middleware.policy import Policy, Subject

WEB = Subject("11111111-2222-4333-8444-555555555555", "web-1", "V" * 43)
PSS = "rsassa-pss-sha256"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def policy(folder: Path, text: str, clock: Clock | None = None) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    made = Policy(path, monotonic=clock or Clock())
    made.reload()
    return made


def rule(selector: str = 'names = ["web-*"]', rest: str = 'operations = ["sign"]\nschemes = ["rsassa-pss-*"]') -> str:
    return f"[[rule]]\n{selector}\n{rest}\n"


def reason(made: Policy, subject: Subject = WEB, operation: str = "sign", scheme: str = PSS) -> Reason | None:
    try:
        made.permit(subject, operation, scheme)
    except Refused as error:
        return error.reason
    return None


def test_what_no_rule_allows_is_denied(tmp_path: Path) -> None:
    assert reason(policy(tmp_path, "")) is Reason.POLICY_DENIED
    made = policy(tmp_path, rule())
    assert reason(made) is None
    assert reason(made, operation="decrypt", scheme="rsaes-oaep-sha256") is Reason.POLICY_DENIED
    assert reason(made, scheme="ecdsa-sha256") is Reason.POLICY_DENIED
    assert reason(made, Subject(WEB.uuid, "db", WEB.vmid)) is Reason.POLICY_DENIED


@pytest.mark.parametrize(
    "selector",
    [
        'names = ["web-?"]',
        f'uuids = ["{WEB.uuid}"]',
        f'vmids = ["{"V" * 43}"]',
        'names = ["db", "web-1"]',
        'uuids = ["1111*"]',
    ],
)
def test_selectors(tmp_path: Path, selector: str) -> None:
    assert reason(policy(tmp_path, rule(selector))) is None


def test_a_name_that_looks_like_another_vms_uuid_wins_nothing(tmp_path: Path) -> None:
    made = policy(tmp_path, rule(f'uuids = ["{WEB.uuid}"]'))
    impostor = Subject("99999999-2222-4333-8444-555555555555", WEB.uuid, "W" * 43)
    assert reason(made, impostor) is Reason.POLICY_DENIED


def test_every_selector_given_must_match(tmp_path: Path) -> None:
    made = policy(tmp_path, rule('names = ["web-*"]\nuuids = ["99*"]'))
    assert reason(made) is Reason.POLICY_DENIED


@pytest.mark.parametrize(
    "text",
    [
        "[[rule]",
        "rules = []",
        rule() + "opertions = []",
        rule(""),
        rule("names = []"),
        rule(rest='operations = []\nschemes = ["*"]'),
        rule(rest='operations = ["sign"]\nschemes = ["rsaes-*"]'),
        rule(rest='operations = ["sing"]\nschemes = ["*"]'),
        rule(rest='operations = ["sign"]\nschemes = ["rsassa-pps-*"]'),
        rule() + "rate = { per_second = 0, burst = 1 }",
        rule() + "rate = { per_second = nan, burst = 1 }",
        rule() + "rate = { per_second = 1 }",
        rule() + rule() + rule('names = [""]'),
        "\x00",
    ],
)
def test_a_fault_anywhere_refuses_everything(tmp_path: Path, text: str) -> None:
    made = policy(tmp_path, text)
    assert reason(made) is Reason.POLICY_INVALID
    assert made.problems
    with pytest.raises(Refused):
        made.require_valid()
    with pytest.raises(Refused):
        made.operations(WEB)


def test_a_missing_file_refuses_everything_until_it_is_there(tmp_path: Path) -> None:
    made = Policy(tmp_path / "policy.toml", monotonic=Clock())
    assert reason(made) is Reason.POLICY_INVALID
    made.reload()
    assert reason(made) is Reason.POLICY_INVALID
    (tmp_path / "policy.toml").write_text(rule())
    made.reload()
    assert reason(made) is None
    (tmp_path / "policy.toml").write_text("broken")
    made.reload()
    assert reason(made) is Reason.POLICY_INVALID


def test_a_rate_is_a_token_bucket_a_vm(tmp_path: Path) -> None:
    clock = Clock()
    text = rule() + "rate = { per_second = 2, burst = 3 }"
    made = policy(tmp_path, text, clock)
    assert [reason(made) for _ in range(4)] == [None, None, None, Reason.RATE_LIMITED]
    with pytest.raises(Refused) as refused:
        made.permit(WEB, "sign", PSS)
    assert refused.value.retry_after == pytest.approx(0.5)
    assert reason(made, Subject("other", "web-2", "W" * 43)) is None
    clock.now += 0.5
    assert [reason(made) for _ in range(2)] == [None, Reason.RATE_LIMITED]
    # Reading the same rule again gives no new burst.
    made.reload()
    assert reason(made) is Reason.RATE_LIMITED
    clock.now += 1000
    assert [reason(made) for _ in range(4)] == [None, None, None, Reason.RATE_LIMITED]


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    made = policy(tmp_path, rule() + "rate = { per_second = 0.001, burst = 1 }\n" + rule('names = ["*"]'))
    assert [reason(made), reason(made)] == [None, Reason.RATE_LIMITED]


def test_operations_of_a_vm(tmp_path: Path) -> None:
    made = policy(tmp_path, rule() + rule(rest='operations = ["decrypt", "encrypt"]\nschemes = ["rsaes-oaep-*"]'))
    assert made.operations(WEB) == {"sign", "decrypt", "encrypt"}
    assert made.operations(Subject("u", "db", "v")) == frozenset()


def test_the_example_allows_nothing_until_somebody_says_so(tmp_path: Path) -> None:
    assert reason(policy(tmp_path, EXAMPLE_POLICY)) is Reason.POLICY_DENIED
    start = EXAMPLE_POLICY.index("# [[rule]]")
    said = EXAMPLE_POLICY[:start] + EXAMPLE_POLICY[start:].replace("# ", "")
    assert reason(policy(tmp_path, said)) is None
    assert policy(tmp_path, said).operations(Subject("u", "mail", "v")) == {"decrypt"}


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_any_bytes_are_a_policy_or_refuse(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_bytes(content)
    made = Policy(path, monotonic=Clock())
    made.reload()
    assert reason(made) in (Reason.POLICY_INVALID, Reason.POLICY_DENIED)


@given(st.lists(st.floats(0, 10), max_size=60), st.integers(1, 5), st.floats(0.1, 20))
@settings(max_examples=100)
def test_a_bucket_never_gives_more_than_its_rate(
    tmp_path_factory: pytest.TempPathFactory, steps: list[float], burst: int, per_second: float
) -> None:
    clock = Clock()
    text = rule() + f"rate = {{ per_second = {per_second}, burst = {burst} }}"
    made = policy(tmp_path_factory.mktemp("policy"), text, clock)
    begin, given_out = clock.now, 0
    for step in steps:
        clock.now += step
        given_out += reason(made) is None
        assert given_out <= burst + (clock.now - begin) * per_second + 1e-6
