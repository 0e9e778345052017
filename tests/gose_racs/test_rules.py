"""The node's tables, without a node: which commands a rule means, and which settings are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gose.racs.access import Grant
from gose.racs.rules import NAMED_RULES, ApduRule, RuleError, parse_rules
from gose.racs.settings import NodeSettings
from secfunet.card.instructions import AID, AID_OF_DOMAIN, AID_OF_DRAFT
from secfunet.service.settings import SettingsError, load_settings

SETTINGS = """
key = "node.key"
certificate = "node.pem"
authority = "ca.pem"
secure_elements = [{ seid = "b-1", socket = "b-1.sock" }, { seid = "b-2", socket = "b-2.sock" }]
"""
USER = """
[[users]]
name = "grid-a"
[[users.grants]]
secure_elements = ["b-1"]
allow = ["operate", "80460000/FFFF00FF"]
deny = ["802A9E01"]
"""


@given(prefix=st.binary(min_size=4, max_size=20), mask=st.binary(min_size=20, max_size=20), apdu=st.binary(max_size=30))
def test_a_rule_means_what_its_mask_leaves(prefix: bytes, mask: bytes, apdu: bytes) -> None:
    mask = mask[: len(prefix)]
    masked = bytes(a & b for a, b in zip(prefix, mask, strict=True))
    (rule,) = parse_rules(f"{masked.hex()}/{mask.hex()}")
    expected = len(apdu) >= len(masked) and all(a & m == p for a, m, p in zip(apdu, mask, masked, strict=False))
    assert rule.means(apdu) is expected
    assert rule.means(prefix + apdu)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_refused(untrusted: str) -> None:
    try:
        rules = parse_rules(untrusted)
    except RuleError:
        return
    assert all(len(rule.prefix) == len(rule.mask) >= 4 for rule in rules)


@pytest.mark.parametrize(
    "text", ["", "00A4", "00A40400/", "00A40400/FF", "00A40401/FFFFFF00", "xyz", "/", "OPERATE", "00" * 65]
)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(RuleError):
        parse_rules(text)


def named(name: str) -> Grant:
    return Grant(NAMED_RULES[name], (), may_name=False)


@pytest.mark.parametrize(
    ("apdu", "who"),
    [
        (b"\x00\xa4\x04\x00\x0a" + AID, {"operate", "tls", "personalise"}),
        (b"\x00\xa4\x04\x00\0\0\x0a" + AID + b"\0\0", {"operate", "tls", "personalise"}),
        (b"\x00\xa4\x04\x00\x07" + AID_OF_DRAFT, set()),
        (b"\x00\xa4\x04\x00", set()),
        ("A020000008" + "30" * 8, {"operate", "tls", "personalise"}),
        ("A020000108" + "30" * 8, set()),
        ("802A9E0720" + "00" * 32, {"operate"}),
        ("902A9E07F0" + "00" * 240, {"operate"}),
        ("802C000010" + "00" * 16, {"operate"}),
        ("804C000000", {"operate"}),
        ("804A010003787878", set()),
        ("802A8201", set()),  # a content key is for the hypervisor's own card to unwrap
        ("A080000006010100060D20", {"tls"}),
        ("A0800100F0", {"tls"}),
        ("A082CB0000", {"tls"}),
        ("8046010003787878", set()),
        ("80E4000003787878", set()),
        (b"\x00\xa4\x04\x00\x08" + AID_OF_DOMAIN, {"personalise"}),
        ("8050000008" + "00" * 8, {"personalise"}),
        ("8482330010" + "00" * 16, {"personalise"}),
        ("9446010010" + "00" * 16, {"personalise"}),
        ("842A9E0710" + "00" * 16, {"personalise"}),
        ("80D8008110", set()),  # outside a channel
        ("80CA000000", {"operate", "tls", "personalise"}),
    ],
)
def test_the_named_rules(apdu: str | bytes, who: set[str]) -> None:
    command = bytes.fromhex(apdu) if isinstance(apdu, str) else apdu
    assert {name for name in NAMED_RULES if named(name).permits(command)} == who


def test_deny_wins() -> None:
    everything = ApduRule(bytes(4), bytes(4))
    assert Grant((everything,), (), may_name=False).permits(bytes(4))
    assert not Grant((everything,), (everything,), may_name=False).permits(bytes(4))
    assert not Grant((), (), may_name=False).permits(bytes(4))
    assert not Grant((everything,), (), may_name=False).permits(bytes(3))


@pytest.mark.parametrize(
    ("denied", "command", "is_denied"),
    [
        ("80100200", "80100200", True),
        pytest.param("80100200", "90100200FF", True, id="the head of a chain"),
        pytest.param("80100200", "8410020008", True, id="secure messaging"),
        pytest.param("80100200", "9C10020008", True, id="a chain under secure messaging"),
        pytest.param("80100200", "82100200", True, id="another logical channel"),
        pytest.param("80100200", "E0100200", True, id="one of the further logical channels"),
        pytest.param("80100200", "80100300", False, id="another command"),
        pytest.param("80100200", "00100200", False, id="another class"),
        pytest.param("80100200", "A0100200", False, id="a proprietary class of another kind"),
        pytest.param("00A4040003A00000", "00A4040003A00000", True, id="with data"),
        pytest.param("00A4040003A00000", "00A40400000003A00000", True, id="an extended length"),
        pytest.param("00A40400000003A00000", "00A4040003A00000", True, id="a short length"),
        pytest.param("00A4040003A00000", "00A4040003A00001", False, id="with other data"),
        pytest.param("00A4040003A00000", "10A4040001A0", True, id="a part of a chain shows too little of its data"),
        pytest.param("04000000/04000000", "80100200", False, id="a rule about secure messaging"),
        pytest.param("04000000/04000000", "84100200", True, id="a command that such a rule means"),
        pytest.param("00100000/00FF0000", "94100200", True, id="whatever its class"),
    ],
)
def test_what_is_denied_is_denied_in_every_form(denied: str, command: str, is_denied: bool) -> None:
    everything = ApduRule(bytes(4), bytes(4))
    grant = Grant((everything,), parse_rules(denied), may_name=False)
    assert grant.permits(bytes.fromhex(command)) is not is_denied


def load(tmp_path: Path, text: str) -> NodeSettings:
    path = tmp_path / "racs.toml"
    path.write_text(text)
    return load_settings(NodeSettings, path)


def test_settings(tmp_path: Path) -> None:
    settings = load(tmp_path, SETTINGS + USER)
    assert settings.key == tmp_path / "node.key"
    assert settings.users[0].label == "node:grid-a"
    assert load(tmp_path, SETTINGS).users == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(("name =", "nmae ="), "nmae", id="an unknown key"),
        pytest.param(('name = "grid-a"', ""), "thumbprint", id="nobody"),
        pytest.param(('name = "grid-a"', 'name = "grid a"'), "name has 1 to 64", id="no name"),
        pytest.param(('name = "grid-a"', 'thumbprint = "abc"'), "43 characters", id="no thumbprint"),
        pytest.param(
            ('name = "grid-a"', f'thumbprint = "{"A" * 43}"\nrole = "vm"'), "needs no 'role'", id="two at once"
        ),
        pytest.param(("802A9E01", "802A9E"), "802A9E", id="a short rule"),
        pytest.param(("/FFFF00FF", "/FF0000FF"), "means no command", id="a rule that means nothing"),
        pytest.param(('["b-1"]', '["b-3"]'), "b-3", id="a card that is not there"),
        pytest.param(('["b-1"]', '["b-1", "b-1"]'), "one grant", id="a card twice"),
        pytest.param(('"b-2"', '"b-1"'), "same seid", id="two cards of one name"),
        pytest.param(('"b-1", socket', '"b[1]", socket'), "SEID", id="a name that a list could not carry"),
        pytest.param(("b-2.sock", "b-1.sock"), "same place", id="two cards at one socket"),
        pytest.param(("[[users.grants]]\n", ""), "grants", id="no grant"),
        pytest.param(("[[users]]", USER + "[[users]]"), "same user", id="one user twice"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    text = SETTINGS + USER
    assert change[0] in text
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text.replace(*change, 1))
    assert says in str(caught.value)


def test_the_rules_are_documented() -> None:
    told: Any = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert all(f"`{name}`" in told for name in NAMED_RULES)
