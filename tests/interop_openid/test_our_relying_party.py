"""Our relying party against python3-openid's provider (Node's library has none)."""

from __future__ import annotations

import pytest

from secfunet.openid.association import AssociationType, SessionType
from secfunet.openid.effects import FetchPolicy, drive_blocking
from secfunet.openid.errors import AssertionRefusedError, SetupNeeded
from secfunet.openid.form import decode_query, url_with_message
from secfunet.openid.relying_party import DEFAULT_PREFERENCES, Preference, RelyingParty
from secfunet.openid.store import MemoryStore
from tests.interop_openid.places import TheirProvider, fetch, location_of

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

RETURN_TO = "http://127.0.0.1:1/return?state=1"
REALM = "http://127.0.0.1:1/"
SHA256: Preference = (AssociationType.HMAC_SHA256, SessionType.DH_SHA256)
SHA1: Preference = (AssociationType.HMAC_SHA1, SessionType.DH_SHA1)


def party(theirs: TheirProvider, *preferences: Preference) -> RelyingParty:
    policy = FetchPolicy([theirs.origin], unsafe_allow_http=True)
    return RelyingParty(REALM, RETURN_TO, MemoryStore(), policy, preferences=preferences or DEFAULT_PREFERENCES)


@pytest.mark.parametrize("preference", [SHA256, SHA1], ids=lambda pair: pair[1].value)
@pytest.mark.parametrize("path", ["/", "/id/alice"])
def test_a_login_with_an_association(theirs: TheirProvider, preference: Preference, path: str) -> None:
    relying = party(theirs, preference)
    service = drive_blocking(relying.discover(theirs.origin + path), fetch)
    association = drive_blocking(relying.associate(service), fetch)
    assert association.type is preference[0]
    url = location_of(relying.authentication_request(service, association))
    assert drive_blocking(relying.verify_response(url, expected=service), fetch) == f"{theirs.origin}/id/alice"
    assert [params["openid.mode"] for params in theirs.requests] == ["associate", "checkid_setup"]
    with pytest.raises(AssertionRefusedError) as refused:
        drive_blocking(relying.verify_response(url, expected=service), fetch)
    assert refused.value.step == "nonce"


def test_a_login_without_an_association_is_asked_about(theirs: TheirProvider) -> None:
    relying = party(theirs)
    service = drive_blocking(relying.discover(f"{theirs.origin}/"), fetch)
    url = location_of(relying.authentication_request(service))
    assert drive_blocking(relying.verify_response(url, expected=service), fetch) == f"{theirs.origin}/id/alice"
    assert [params["openid.mode"] for params in theirs.requests] == ["checkid_setup", "check_authentication"]


@pytest.mark.parametrize("with_association", [True, False])
@pytest.mark.parametrize("field", ["sig", "response_nonce", "identity", "return_to", "op_endpoint", "claimed_id"])
def test_an_altered_assertion_is_refused(theirs: TheirProvider, field: str, with_association: bool) -> None:
    relying = party(theirs)
    service = drive_blocking(relying.discover(f"{theirs.origin}/"), fetch)
    association = drive_blocking(relying.associate(service), fetch) if with_association else None
    fields = decode_query(location_of(relying.authentication_request(service, association)))
    message = {key.removeprefix("openid."): value for key, value in fields.items() if key.startswith("openid.")}
    message[field] = ("x" if message[field][0] != "x" else "y") + message[field][1:]
    with pytest.raises(AssertionRefusedError):
        drive_blocking(relying.verify_response(url_with_message(RETURN_TO, message), expected=service), fetch)


def test_checkid_immediate_is_answered_by_setup_needed(theirs: TheirProvider) -> None:
    relying = party(theirs)
    service = drive_blocking(relying.discover(f"{theirs.origin}/"), fetch)
    url = location_of(relying.authentication_request(service, immediate=True))
    with pytest.raises(SetupNeeded):
        drive_blocking(relying.verify_response(url, expected=service), fetch)


def test_two_hundred_associations_agree_on_the_key(theirs: TheirProvider) -> None:
    for number in range(200):
        relying = party(theirs, SHA256 if number % 2 else SHA1)
        service = drive_blocking(relying.discover(f"{theirs.origin}/id/alice"), fetch)
        association = drive_blocking(relying.associate(service), fetch)
        url = location_of(relying.authentication_request(service, association))
        drive_blocking(relying.verify_response(url, expected=service), fetch)
