"""Our provider against relying parties that nobody here wrote: python3-openid and Node's openid."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from openid.consumer.consumer import CANCEL, FAILURE, SETUP_NEEDED, SUCCESS, Consumer
from openid.store.memstore import MemoryStore

from secfunet.openid.form import IDENTIFIER_SELECT, decode_query
from tests.interop_openid.places import HOW, OurProvider, location_of

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

RETURN_TO = "http://127.0.0.1:1/return?state=1"
REALM = "http://127.0.0.1:1/"
PREFERENCES = [("HMAC-SHA256", "DH-SHA256"), ("HMAC-SHA1", "DH-SHA1")]


def login(consumer: Consumer, identifier: str, *, immediate: bool = False) -> str:
    """Where the user comes back to."""
    request = consumer.begin(identifier)
    return location_of(request.redirectURL(REALM, RETURN_TO, immediate=immediate))


def complete(consumer: Consumer, url: str) -> object:
    return consumer.complete(decode_query(url), url)


@pytest.mark.parametrize("preference", PREFERENCES, ids=lambda pair: pair[1])
def test_python3_openid_logs_in_with_each_kind_of_association(ours: OurProvider, preference: tuple[str, str]) -> None:
    consumer = Consumer({}, MemoryStore())
    consumer.setAssociationPreference([preference])
    url = login(consumer, ours.identifier())
    response = complete(consumer, url)
    assert response.status == SUCCESS, response  # type: ignore[attr-defined]  # untyped library
    assert response.identity_url == ours.identifier()  # type: ignore[attr-defined]  # untyped library
    modes = [params["openid.mode"] for params in ours.requests]
    assert modes == ["associate", "checkid_setup"], "the signature was checked with the association"
    assert ours.requests[0]["openid.session_type"] == preference[1]


@pytest.mark.parametrize("how", HOW)
def test_python3_openid_discovers_our_provider_in_every_way(ours: OurProvider, how: str) -> None:
    consumer = Consumer({}, MemoryStore())
    consumer.setAssociationPreference([("HMAC-SHA256", "DH-SHA256")])
    response = complete(consumer, login(consumer, ours.identifier(how)))
    assert response.status == SUCCESS, response  # type: ignore[attr-defined]  # untyped library
    assert response.identity_url == ours.identifier(how)  # type: ignore[attr-defined]  # untyped library


def test_python3_openid_lets_our_provider_choose_the_identifier(ours: OurProvider) -> None:
    consumer = Consumer({}, MemoryStore())
    response = complete(consumer, login(consumer, f"{ours.origin}/"))
    assert response.status == SUCCESS, response  # type: ignore[attr-defined]  # untyped library
    assert response.identity_url == ours.identifier()  # type: ignore[attr-defined]  # untyped library


def test_python3_openid_without_a_store_asks_our_provider_and_only_once(ours: OurProvider) -> None:
    consumer = Consumer({}, None)
    url = login(consumer, ours.identifier())
    assert complete(consumer, url).status == SUCCESS  # type: ignore[attr-defined]  # untyped library
    assert [params["openid.mode"] for params in ours.requests] == ["checkid_setup", "check_authentication"]
    again = Consumer({}, None)
    again.begin(ours.identifier())
    assert complete(again, url).status == FAILURE  # type: ignore[attr-defined]  # untyped library


@pytest.mark.parametrize("field", ["identity", "claimed_id", "response_nonce", "op_endpoint", "sig"])
def test_python3_openid_finds_that_our_assertion_was_altered(ours: OurProvider, field: str) -> None:
    consumer = Consumer({}, MemoryStore())
    query = decode_query(login(consumer, ours.identifier()))
    query[f"openid.{field}"] = query[f"openid.{field}"][:-1] + ("A" if query[f"openid.{field}"][-1] != "A" else "B")
    assert consumer.complete(query, RETURN_TO).status == FAILURE


def test_python3_openid_understands_setup_needed_and_cancel(ours: OurProvider) -> None:
    consumer = Consumer({}, MemoryStore())
    url = login(consumer, ours.identifier(), immediate=True)
    assert complete(consumer, url).status == SETUP_NEEDED  # type: ignore[attr-defined]  # untyped library
    request = consumer.begin(ours.identifier())
    parsed = ours.provider.parse_checkid(decode_query(request.redirectURL(REALM, RETURN_TO)))
    assert complete(consumer, ours.provider.cancel(parsed)).status == CANCEL  # type: ignore[attr-defined]  # untyped library


def test_two_hundred_associations_with_python3_openid_agree_on_the_key(ours: OurProvider) -> None:
    """A number whose top byte is zero, or whose top bit is set, comes up often enough here to show a wrong btwoc."""
    for number in range(200):
        consumer = Consumer({}, MemoryStore())
        consumer.setAssociationPreference([PREFERENCES[number % 2]])
        response = complete(consumer, login(consumer, ours.identifier()))
        assert response.status == SUCCESS, response  # type: ignore[attr-defined]  # untyped library


@pytest.mark.parametrize(("mode", "checked_by"), [("association", "associate"), ("stateless", "check_authentication")])
@pytest.mark.parametrize("how", [*HOW, ""])
def test_node_openid_logs_in(ours: OurProvider, node_relying_party: Path, mode: str, checked_by: str, how: str) -> None:
    identifier = ours.identifier(how) if how else f"{ours.origin}/"
    node = shutil.which("node")
    assert node is not None
    done = subprocess.run(
        [node, node_relying_party, identifier, RETURN_TO, REALM, mode, "2"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logins = [json.loads(line) for line in done.stdout.splitlines()]
    assert [login["authenticated"] for login in logins] == [True, True]
    # Where it finds an XRDS document, this library leaves the choice to the provider.
    asked = {params["openid.claimed_id"] for params in ours.requests if params["openid.mode"] == "checkid_setup"}
    assert asked == ({identifier} if how == "link" else {IDENTIFIER_SELECT})
    believed = identifier if how == "link" else ours.identifier()
    assert {login["claimedIdentifier"] for login in logins} == {believed}
    modes = {params["openid.mode"] for params in ours.requests}
    assert modes == {"checkid_setup", checked_by}
