"""The relying party's checks (§11), each with an answer that only it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.openid.association import Association, AssociationKind, AssociationType, SessionType
from secfunet.openid.discovery import SERVICE_SIGNON, DiscoveredService, xrds_document
from secfunet.openid.effects import FetchPolicy, HttpResponse
from secfunet.openid.errors import (
    AssertionRefusedError,
    AssociationRefusedError,
    AuthenticationCancelled,
    OpenIdError,
    RealmError,
    ReportedError,
    SetupNeeded,
)
from secfunet.openid.form import NAMESPACE, decode_form, encode_key_values
from secfunet.openid.nonce import make_nonce
from secfunet.openid.relying_party import RelyingParty
from secfunet.openid.store import MemoryStore
from tests.secfunet_openid.world import ALICE, ENDPOINT, OP, RETURN_TO, Stream, World, message_in, with_message, xrds

BOTH = pytest.mark.parametrize("associated", [True, False])


@BOTH
def test_an_assertion_holds_once(associated: bool) -> None:
    world = World()
    url = world.assertion(associated=associated)
    assert world.verify(url) == ALICE
    with pytest.raises(AssertionRefusedError):
        world.verify(url)


def test_a_nonce_is_used_once_and_within_its_window() -> None:
    world = World()
    url = world.assertion()
    world.verify(url)
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(url)
    assert refused.value.step == "nonce"
    for seconds in (-301, 301):
        late = World()
        url = late.assertion()
        late.now += seconds
        with pytest.raises(AssertionRefusedError) as refused:
            late.verify(url)
        assert refused.value.step == "nonce"


def test_a_forged_assertion_does_not_spend_a_nonce() -> None:
    world = World()
    url = world.assertion()
    message = message_in(url)
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(with_message({**message, "sig": "AAAA"}))
    assert refused.value.step == "signature"
    assert world.verify(url) == ALICE


@BOTH
@pytest.mark.parametrize(
    "field",
    [
        "op_endpoint",
        "claimed_id",
        "identity",
        "return_to",
        "response_nonce",
        "assoc_handle",
        "sig",
        "signed",
        "mode",
        "ns",
    ],
)
def test_every_field_counts(field: str, associated: bool) -> None:
    world = World()
    message = message_in(world.assertion(associated=associated))
    for altered in ("", message[field] + "x", message[field][1:], "x" + message[field]):
        with pytest.raises(OpenIdError):
            world.verify(with_message({**message, field: altered}))
    del message[field]
    with pytest.raises(OpenIdError):
        world.verify(with_message(message))


@BOTH
@pytest.mark.parametrize(
    "field", ["op_endpoint", "claimed_id", "identity", "return_to", "response_nonce", "assoc_handle"]
)
def test_every_required_field_must_be_signed(field: str, associated: bool) -> None:
    """Even where the provider itself signed less."""
    world = World()
    message = message_in(world.assertion(associated=associated))
    signed = ",".join(name for name in message["signed"].split(",") if name != field)
    kind = AssociationKind.SHARED if associated else AssociationKind.PRIVATE
    association = world.store.find_association(kind, ENDPOINT, message["assoc_handle"], world.now)
    assert association is not None
    forged = {**message, "signed": signed}
    forged["sig"] = association.sign(forged, signed)
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(with_message(forged))
    assert refused.value.step == "signature"


@pytest.mark.parametrize(
    "arrived",
    [
        "https://sp.test/return?state=2",
        "https://sp.test/return",
        "https://sp.test/other?state=1",
        "https://sp.test:8443/return?state=1",
        "http://sp.test/return?state=1",
        "https://evil.test/return?state=1",
    ],
)
def test_an_answer_that_arrives_elsewhere(arrived: str) -> None:
    world = World()
    message = message_in(world.assertion())
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(with_message(message, arrived))
    assert refused.value.step == "return_to"


def test_an_answer_to_another_login_of_the_same_party() -> None:
    world = World()
    url = world.assertion(return_to="https://sp.test/return?state=2")
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(url)
    assert refused.value.step == "return_to"
    assert world.verify(url, return_to="https://sp.test/return?state=2") == ALICE


def test_a_parameter_that_comes_twice_is_no_answer() -> None:
    world = World()
    url = world.assertion()
    for extra in ("&openid.identity=x", "&state=1"):
        with pytest.raises(AssertionRefusedError):
            world.verify(url + extra)


def test_a_provider_speaks_only_for_its_own_identifiers() -> None:
    """The identifier's own document names another provider: discovery refuses, though the signature is right."""
    world = World()
    url = world.assertion()
    world.pages[ALICE] = xrds(xrds_document(f"{OP}/another", service_type=SERVICE_SIGNON))
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(url)
    assert refused.value.step == "discovery"
    world.pages[ALICE] = xrds(xrds_document(ENDPOINT, service_type=SERVICE_SIGNON, local_id="https://op.test/bob"))
    with pytest.raises(AssertionRefusedError, match="another identity"):
        world.verify(url)
    world.pages[ALICE] = xrds(xrds_document(ENDPOINT))
    with pytest.raises(AssertionRefusedError, match="that of a provider"):
        world.verify(url)
    world.pages[ALICE] = HttpResponse(302, {"Location": f"{OP}/bob"})
    world.pages[f"{OP}/bob"] = xrds(xrds_document(ENDPOINT, service_type=SERVICE_SIGNON))
    with pytest.raises(AssertionRefusedError):
        world.verify(url)


def test_the_provider_that_was_asked_must_answer_about_the_identifier_that_was_asked() -> None:
    world = World()
    url = world.assertion()
    for expected in (
        DiscoveredService(f"{OP}/another", ALICE, ALICE),
        DiscoveredService(ENDPOINT, f"{OP}/bob", f"{OP}/bob"),
    ):
        with pytest.raises(AssertionRefusedError) as refused:
            world.run(world.party.verify_response(url, return_to=RETURN_TO, expected=expected))
        assert refused.value.step == "discovery"


def test_discovery_before_belief_may_be_remembered_for_a_while() -> None:
    world = World()
    world.party = RelyingParty(
        "https://sp.test/",
        RETURN_TO,
        world.store,
        FetchPolicy([OP]),
        lambda: world.now,
        Stream(),
        discovery_lifetime=100,
    )
    for expected in (1, 1, 2):
        assert world.verify(world.assertion()) == ALICE
        assert sum(request.url == ALICE for request in world.requests) == expected
        world.now += 60


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"mode": "cancel"}, AuthenticationCancelled),
        ({"mode": "setup_needed"}, SetupNeeded),
        ({"mode": "error", "error": "no"}, ReportedError),
        ({"mode": "checkid_setup"}, AssertionRefusedError),
        ({}, AssertionRefusedError),
        ({"mode": "id_res"}, AssertionRefusedError),
    ],
)
def test_answers_that_assert_nothing(message: dict[str, str], error: type[OpenIdError]) -> None:
    with pytest.raises(error):
        World().verify(with_message({"ns": NAMESPACE, **message}))


def test_an_answer_by_post_is_checked_like_one_by_get() -> None:
    world = World()
    url = world.assertion()
    where, _, query = url.partition("&")
    claimed = world.run(world.party.verify_form(where, query.encode(), return_to=RETURN_TO, expected=world.service))
    assert claimed == ALICE


def test_an_association_is_reused_until_it_is_nearly_over() -> None:
    world = World()
    first = world.run(world.party.associate(world.service))
    assert world.run(world.party.associate(world.service)) is first
    world.now += 3600 - 30
    assert world.run(world.party.associate(world.service)) is not first


def test_what_the_provider_offers_instead_is_taken_once_and_only_if_it_is_accepted_here() -> None:
    world = World(over_tls=False)  # this provider refuses no-encryption
    preferences = (
        (AssociationType.HMAC_SHA256, SessionType.NO_ENCRYPTION),
        (AssociationType.HMAC_SHA256, SessionType.DH_SHA256),
    )

    def party(count: int) -> RelyingParty:
        return RelyingParty(
            "https://sp.test/", RETURN_TO, MemoryStore(), FetchPolicy([OP]), preferences=preferences[:count]
        )

    assert world.run(party(2).associate(world.service)).type is AssociationType.HMAC_SHA256
    sessions = [decode_form(request.body)["openid.session_type"] for request in world.requests]
    assert sessions == ["no-encryption", "DH-SHA256"]
    with pytest.raises(AssociationRefusedError):
        world.run(party(1).associate(world.service))


@pytest.mark.parametrize(
    "changes",
    [
        {"assoc_type": "HMAC-SHA1"},
        {"session_type": "no-encryption", "mac_key": "A" * 44},
        {"expires_in": "x"},
        {"expires_in": "-1"},
        {"assoc_handle": "a b"},
        {"assoc_handle": ""},
        {"dh_server_public": "AQ=="},
        {"dh_server_public": ""},
        {"enc_mac_key": "AAAA"},
        {"ns": "x"},
    ],
)
def test_associations_that_cannot_be_used(changes: dict[str, str]) -> None:
    world = World()

    def fetch(request: object) -> HttpResponse:
        honest = World.fetch(world, request)  # type: ignore[arg-type]  # passed through
        fields = dict(line.split(":", 1) for line in honest.body.decode().splitlines())
        return HttpResponse(200, honest.headers, encode_key_values({**fields, **changes}.items()))

    world.fetch = fetch  # type: ignore[method-assign]  # a provider that misbehaves
    with pytest.raises(AssociationRefusedError):
        world.run(world.party.associate(world.service))


def test_a_return_to_outside_of_the_realm_is_not_sent() -> None:
    world = World()
    with pytest.raises(RealmError):
        world.party.authentication_request(world.service, return_to="https://evil.test/")


def test_an_invalidated_handle_is_forgotten_when_the_provider_confirms_it() -> None:
    world = World()
    association = world.run(world.party.associate(world.service))
    world.store.remove_association(AssociationKind.SHARED, ENDPOINT, association.handle)  # the provider lost it
    url = world.party.authentication_request(world.service, association, return_to=RETURN_TO)
    parsed = world.provider.parse_checkid({f"openid.{key}": value for key, value in message_in(url).items()})
    assert world.verify(world.provider.positive_assertion(parsed, ALICE)) == ALICE
    assert world.store.find_association(AssociationKind.RELYING, ENDPOINT, association.handle, world.now) is None


def test_a_handle_of_another_provider_is_not_used() -> None:
    """An association with one provider signs nothing for another one."""
    world = World()
    foreign = Association(
        AssociationKind.RELYING, f"{OP}/another", "foreign", AssociationType.HMAC_SHA256, bytes(32), world.now + 60
    )
    world.store.save_association(foreign)
    message = message_in(world.assertion()) | {"assoc_handle": "foreign"}
    message["response_nonce"] = make_nonce(world.now, Stream("new"))
    message["sig"] = foreign.sign(message, message["signed"])
    with pytest.raises(AssertionRefusedError) as refused:
        world.verify(with_message(message))
    assert refused.value.step == "signature"


@given(st.text(max_size=80) | st.dictionaries(st.text(max_size=8), st.text(max_size=8)).map(with_message))
def test_any_url_is_refused_by_an_error_of_ours(url: str) -> None:
    with pytest.raises(OpenIdError):
        World().verify(url)
