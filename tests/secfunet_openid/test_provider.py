"""The provider's rules, one after the other."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.openid.association import AssociationKind
from secfunet.openid.diffie_hellman import DEFAULT_MODULUS, DhGroup, DhKey, encode_number
from secfunet.openid.errors import CheckidError
from secfunet.openid.form import IDENTIFIER_SELECT, NAMESPACE, decode_key_values
from secfunet.openid.provider import PRIVATE_LIFETIME, OpenIdProvider
from secfunet.openid.store import MemoryStore
from tests.secfunet_openid.world import (
    ALICE,
    ENDPOINT,
    REALM,
    RETURN_TO,
    Stream,
    World,
    message_in,
    request,
)

CHECKID = {
    "mode": "checkid_setup",
    "claimed_id": IDENTIFIER_SELECT,
    "identity": IDENTIFIER_SELECT,
    "return_to": RETURN_TO,
    "realm": REALM,
}


def associate(world: World, **fields: str) -> dict[str, str]:
    answer = world.provider.direct(request(mode="associate", **fields), world.over_tls)
    decoded = decode_key_values(answer.body)
    assert decoded["ns"] == NAMESPACE
    assert (answer.status == 200) == ("error" not in decoded)
    return decoded


def public() -> str:
    return encode_number(DhKey.generate(DhGroup(), Stream()).public)


def test_a_key_in_the_clear_needs_tls() -> None:
    fields = {"assoc_type": "HMAC-SHA256", "session_type": "no-encryption"}
    assert "mac_key" in associate(World(over_tls=True), **fields)
    refused = associate(World(over_tls=False), **fields)
    assert refused["error_code"] == "unsupported-type"
    assert (refused["assoc_type"], refused["session_type"]) == ("HMAC-SHA256", "DH-SHA256")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"assoc_type": "HMAC-MD5", "session_type": "DH-SHA256"},
        {"assoc_type": "HMAC-SHA256", "session_type": "DH-SHA512"},
        {"assoc_type": "HMAC-SHA256", "session_type": "DH-SHA1", "dh_consumer_public": "AQ=="},
        {"assoc_type": "HMAC-SHA256", "session_type": ""},
    ],
)
def test_types_that_are_not_made(fields: dict[str, str]) -> None:
    assert associate(World(), **fields)["error_code"] == "unsupported-type"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dh_consumer_public": ""},
        {"dh_consumer_public": "AQ=="},
        {"dh_consumer_public": "gA=="},
        {"dh_consumer_public": "!"},
        {"dh_consumer_public": encode_number(DEFAULT_MODULUS - 1)},
        {"dh_consumer_public": encode_number(5), "dh_modulus": encode_number(23)},
        {"dh_consumer_public": encode_number(5), "dh_modulus": "A" * 600},
        {"dh_consumer_public": encode_number(5), "dh_gen": encode_number(1)},
    ],
)
def test_numbers_that_are_refused_leave_no_association_behind(fields: dict[str, str]) -> None:
    world = World()
    answer = associate(world, assoc_type="HMAC-SHA256", session_type="DH-SHA256", **fields)
    assert "error" in answer
    assert "error_code" not in answer
    assert world.store.find_association(AssociationKind.SHARED, ENDPOINT, None, world.now) is None


@given(
    st.dictionaries(
        st.sampled_from(["mode", "assoc_type", "session_type", "dh_modulus", "dh_gen", "dh_consumer_public"])
        | st.text(max_size=8),
        st.text(max_size=30),
    )
)
def test_any_direct_request_has_an_answer(fields: dict[str, str]) -> None:
    answer = World().provider.direct(request(**fields), over_tls=True)
    assert answer.status in (200, 400)
    decode_key_values(answer.body)


def test_associations_are_bounded_and_end() -> None:
    world = World(store=MemoryStore(max_associations=5))
    handles = [
        associate(world, assoc_type="HMAC-SHA1", session_type="DH-SHA1", dh_consumer_public=public())["assoc_handle"]
        for _ in range(8)
    ]
    find = lambda handle: world.store.find_association(AssociationKind.SHARED, ENDPOINT, handle, world.now)  # noqa: E731 - a name for three lines
    assert [find(handle) is not None for handle in handles] == [False] * 3 + [True] * 5
    world.now += 3600
    assert find(handles[-1]) is None


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({"mode": "checkid"}, True),
        ({"identity": ""}, True),
        ({"claimed_id": ALICE}, True),
        ({"assoc_handle": "a b"}, True),
        ({"claimed_id": "x" * 2049, "identity": "y"}, True),
        ({"return_to": "https://evil.test/"}, False),
        ({"return_to": "https://sp.test:1/"}, False),
        ({"return_to": ""}, False),
        ({"realm": "https://*.test/"}, False),
        ({"realm": "https://sp.test/#x"}, False),
        ({"ns": "http://openid.net/signon/1.1"}, False),
    ],
)
def test_requests_that_are_refused_and_who_is_told(changes: dict[str, str], is_told: bool) -> None:
    with pytest.raises(CheckidError) as refused:
        World().provider.parse_checkid(request(**CHECKID) | {f"openid.{key}": value for key, value in changes.items()})
    assert (refused.value.redirect is not None) == is_told
    if refused.value.redirect is not None:
        assert refused.value.redirect.startswith(f"{RETURN_TO}&openid.ns=")
        assert message_in(refused.value.redirect)["mode"] == "error"


def test_a_realm_that_is_not_served() -> None:
    provider = OpenIdProvider(ENDPOINT, MemoryStore(), accepts_realm=lambda realm: realm == "https://other.test/")
    with pytest.raises(CheckidError) as refused:
        provider.parse_checkid(request(**CHECKID))
    assert refused.value.redirect is None


@pytest.mark.parametrize("realm", ["https://sp.test", "https://SP.test/", "https://sp.test.:443/"])
def test_a_realm_is_served_in_every_spelling(realm: str) -> None:
    provider = OpenIdProvider(ENDPOINT, MemoryStore(), accepts_realm=lambda realm: realm == "https://sp.test/")
    assert provider.parse_checkid(request(**{**CHECKID, "realm": realm})).return_to == RETURN_TO


def test_an_identifier_is_the_same_in_every_spelling() -> None:
    world = World()
    asked = ALICE.replace(".test", ".TEST")
    parsed = world.provider.parse_checkid(request(**{**CHECKID, "claimed_id": asked, "identity": asked}))
    assert message_in(world.provider.positive_assertion(parsed, ALICE))["claimed_id"] == ALICE


def test_a_missing_realm_is_the_return_to() -> None:
    parsed = World().provider.parse_checkid(request(**{**CHECKID, "realm": ""}))
    assert parsed.realm == "https://sp.test/return"


def test_nobody_is_asserted_to_be_somebody_else() -> None:
    world = World()
    bob = f"{ENDPOINT}/bob"
    parsed = world.provider.parse_checkid(request(**{**CHECKID, "claimed_id": bob, "identity": bob}))
    with pytest.raises(CheckidError) as refused:
        world.provider.positive_assertion(parsed, ALICE)
    assert refused.value.redirect is not None
    assert message_in(refused.value.redirect)["mode"] == "cancel"


def test_the_negative_answers() -> None:
    world = World()
    setup = world.provider.parse_checkid(request(**CHECKID))
    immediate = world.provider.parse_checkid(request(**{**CHECKID, "mode": "checkid_immediate"}))
    assert immediate.immediate
    assert message_in(world.provider.cancel(setup))["mode"] == "cancel"
    assert message_in(world.provider.cancel(immediate))["mode"] == "setup_needed"
    assert message_in(world.provider.setup_needed(immediate))["mode"] == "setup_needed"


def check(world: World, message: dict[str, str]) -> dict[str, str]:
    answer = world.provider.direct(request(**{**message, "mode": "check_authentication"}), over_tls=True)
    return decode_key_values(answer.body)


def test_an_assertion_is_confirmed_once() -> None:
    world = World()
    message = message_in(world.assertion(associated=False))
    assert check(world, message)["is_valid"] == "true"
    assert check(world, message)["is_valid"] == "false"


def test_a_wrong_question_does_not_use_an_assertion_up() -> None:
    world = World()
    message = message_in(world.assertion(associated=False))
    for field in ("claimed_id", "identity", "return_to", "response_nonce", "op_endpoint", "sig"):
        assert check(world, {**message, field: message[field] + "x"})["is_valid"] == "false"
    assert check(world, {**message, "signed": "response_nonce"})["is_valid"] == "false"
    assert check(world, message)["is_valid"] == "true"


def test_an_assertion_is_confirmed_for_a_while_only() -> None:
    world = World()
    message = message_in(world.assertion(associated=False))
    world.now += PRIVATE_LIFETIME
    assert check(world, message)["is_valid"] == "false"


def test_a_shared_association_confirms_nothing() -> None:
    """§11.4.2.1: else whoever holds its key could have his own assertions confirmed as the provider's."""
    world = World()
    assert check(world, message_in(world.assertion(associated=True)))["is_valid"] == "false"


def test_an_association_that_ended_is_named_and_confirmed_as_such() -> None:
    world = World()
    association = world.run(world.party.associate(world.service))
    world.now += 3600
    url = world.party.authentication_request(world.service, association, return_to=RETURN_TO)
    parsed = world.provider.parse_checkid(dict(request(**message_in(url))))
    message = message_in(world.provider.positive_assertion(parsed, ALICE))
    assert message["invalidate_handle"] == association.handle
    assert message["assoc_handle"] != association.handle
    answer = check(world, message)
    assert (answer["is_valid"], answer["invalidate_handle"]) == ("true", association.handle)


def test_a_private_handle_is_never_used_as_a_shared_one() -> None:
    world = World()
    first = message_in(world.assertion(associated=False))
    parsed = world.provider.parse_checkid(request(**CHECKID, assoc_handle=first["assoc_handle"]))
    second = message_in(world.provider.positive_assertion(parsed, ALICE))
    assert second["assoc_handle"] != first["assoc_handle"]


@given(st.dictionaries(st.sampled_from(sorted(CHECKID)) | st.text(max_size=8), st.text(max_size=40)))
def test_any_authentication_request_is_parsed_or_refused(fields: dict[str, str]) -> None:
    with contextlib.suppress(CheckidError):
        World().provider.parse_checkid(request(**{**CHECKID, **fields}))
