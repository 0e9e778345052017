"""Join information and the kept enrolment: what is read, and that anything else is the documented error."""

from __future__ import annotations

import base64
import contextlib
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from secfunet.middleware.v1 import agent_pb2
from tests.vm_agent.double import DER, PEM, make_certificate
from vm_agent.enrolment import Enrolment, EnrolmentAttempt, EnrolmentStore, check_certificate
from vm_agent.errors import EnrolmentRefusedError, IdentityUnusableError, JoinError, NotEnrolledError
from vm_agent.identity import parse_identity
from vm_agent.join import erase_join, parse_join, read_join
from vm_agent.keys import AgentKey

FOLDER = Path("/run/guest")
AUTHORITY_KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = make_certificate("guests", AUTHORITY_KEY.public_key(), AUTHORITY_KEY, ca=True)
UUID = "6f1d3a52-96a1-4b0c-9d7e-5f1f0c0a7b11"
GOOD: dict[str, Any] = {
    "uuid": UUID,
    "join_secret": base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode(),
    "guest_authority": AUTHORITY.public_bytes(PEM).decode(),
    "enrol": "unix:/run/guest/enrol.sock",
    "agent": "unix:agent.sock",
    "server_name": "secure-middleware",
}


def test_what_dom0_hands_over() -> None:
    join = parse_join(json.dumps(GOOD).encode(), FOLDER)
    assert join.secret == bytes(range(32))
    assert join.uuid == UUID
    assert join.enrol == "unix:/run/guest/enrol.sock"
    assert join.agent == "unix:/run/guest/agent.sock"
    assert join.guest_authority == AUTHORITY.public_bytes(DER)
    assert str(join.secret) not in repr(join)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uuid", "domain one"),
        ("join_secret", "short"),
        ("join_secret", "!" * 43),
        ("join_secret", 7),
        ("guest_authority", "no PEM"),
        ("enrol", "tcp:somewhere:1"),
        ("enrol", "unix:"),
        ("agent", "unix:/" + "x" * 120),
        ("agent", "unix:/a\0b"),
        ("server_name", ""),
        ("server_name", "-x"),
        ("server_name", None),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(JoinError):
        parse_join(json.dumps({**GOOD, field: value}).encode(), FOLDER)
    with pytest.raises(JoinError, match=field):
        parse_join(json.dumps({key: kept for key, kept in GOOD.items() if key != field}).encode(), FOLDER)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(sorted(GOOD)), JSON_VALUES).map(
        lambda changes: json.dumps({**GOOD, **changes}).encode()
    )
)
def test_any_bytes_are_join_information_or_a_join_error(untrusted: bytes) -> None:
    with contextlib.suppress(JoinError):
        parse_join(untrusted, FOLDER)


def test_deep_and_long_json_are_join_errors() -> None:
    for untrusted in (b"[" * 16000, b" " * 16385):
        with pytest.raises(JoinError):
            parse_join(untrusted, FOLDER)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("unix:a.sock", f"unix:{FOLDER}/a.sock"),
        ("vchan:enrol", "vchan:enrol"),
        ("tcp:192.168.77.1:7000", "tcp:192.168.77.1:7000"),
        ("tcp:[FD00::0001]:7000", "tcp:[fd00::1]:7000"),
    ],
)
def test_addresses_of_every_transport(written: str, meant: str) -> None:
    assert parse_join(json.dumps({**GOOD, "enrol": written}).encode(), FOLDER).enrol == meant


@pytest.mark.parametrize(
    "written",
    [
        *(
            "vchan:",
            "vchan:other",
            "vchan:agent ",
            "tcp:dom0:7000",
            "tcp:192.168.77.1",
            "tcp:192.168.77.1:0",
            "tcp:1.2.3.4:65536",
        ),
        *(
            "tcp:1.2.3.4:+1",
            "tcp:[fd00::1:7000",
            "tcp:[1.2.3.4]:1",
            "tcp:[fe80::1%eth0]x:1",
            "dns:///dom0:1",
            "http://dom0",
            "tcp:::1",
        ),
    ],
)
def test_an_address_that_is_none(written: str) -> None:
    with pytest.raises(JoinError, match="address"):
        parse_join(json.dumps({**GOOD, "agent": written}).encode(), FOLDER)


def test_read_and_erase(folder: Path) -> None:
    path = folder / "join.json"
    assert read_join(path) is None
    path.touch(mode=0o600)
    path.write_text(json.dumps(GOOD))
    assert read_join(path) == parse_join(json.dumps(GOOD).encode(), folder)
    assert erase_join(path)
    assert not path.exists()
    assert erase_join(path)


def enrolment() -> Enrolment:
    key = AgentKey.generate()
    return Enrolment(UUID, key, issued(key), AUTHORITY.public_bytes(DER), "unix:/run/a.sock", "secure-middleware", "d")


def issued(key: AgentKey, uuid: str = UUID, signer: Any = AUTHORITY_KEY, life: float = 3600, age: float = 5) -> Any:
    from cryptography import x509

    public = x509.load_der_x509_csr(key.signing_request()).public_key()
    uri = x509.UniformResourceIdentifier(f"urn:uuid:{uuid}")
    return make_certificate("agent", public, signer, "guests", sans=[uri], life=life, age=age)


def test_the_enrolment_is_kept_for_its_owner_alone(folder: Path) -> None:
    store = EnrolmentStore(folder)
    assert store.load() is None
    kept = enrolment()
    store.save(kept)
    loaded = store.load()
    assert loaded is not None
    assert loaded.to_json() == kept.to_json()
    path = folder / "enrolment.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"PRIVATE KEY" in path.read_bytes()
    assert "PRIVATE" not in repr(loaded)
    path.chmod(0o640)
    with pytest.raises(NotEnrolledError, match="chmod 600"):
        store.load()


def test_a_key_with_anothers_certificate_is_no_enrolment() -> None:
    mixed = json.loads(enrolment().to_json())
    mixed["certificate"] = json.loads(enrolment().to_json())["certificate"]
    with pytest.raises(NotEnrolledError):
        Enrolment.from_json(json.dumps(mixed).encode())


@given(st.binary(max_size=100) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_enrolment_or_the_documented_error(untrusted: bytes) -> None:
    with pytest.raises(NotEnrolledError):
        Enrolment.from_json(untrusted)


@given(st.binary(max_size=100) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_attempt_or_the_documented_errors(untrusted: bytes) -> None:
    with pytest.raises((JoinError, NotEnrolledError)):
        EnrolmentAttempt.from_json(untrusted, FOLDER)


def test_an_attempt_is_kept_for_its_owner_alone(folder: Path) -> None:
    store = EnrolmentStore(folder)
    assert store.load_attempt() is None
    join = parse_join(json.dumps(GOOD).encode(), folder)
    begun = store.begin_attempt(join)
    assert stat.S_IMODE((folder / "enrolling.json").stat().st_mode) == 0o600
    again = EnrolmentStore(folder).begin_attempt(join)
    assert (again.join, again.key.pem()) == (join, begun.key.pem())
    assert "PRIVATE" not in repr(again)
    assert GOOD["join_secret"] not in repr(again)
    other = store.begin_attempt(replace(join, secret=b"x" * 32))
    assert other.key.pem() != begun.key.pem()
    store.forget_attempt()
    assert store.load_attempt() is None


def test_renewal_is_due_at_two_thirds_of_the_life() -> None:
    key = AgentKey.generate()
    certificate = issued(key, life=3600 - 5, age=5)
    kept = Enrolment(UUID, key, certificate, AUTHORITY.public_bytes(DER), "unix:/a", "s", "d")
    begin = certificate.not_valid_before_utc.timestamp()
    assert kept.renew_at == pytest.approx(begin + 2400, abs=2)


def test_only_our_certificate_of_our_authority_for_our_domain_is_taken() -> None:
    key, authority = AgentKey.generate(), AUTHORITY.public_bytes(DER)
    good = issued(key)
    assert check_certificate(good.public_bytes(DER), key, authority, UUID, 0) == good
    other = "00000000-0000-4000-8000-000000000000"
    for certificate in (
        issued(AgentKey.generate()),
        issued(key, uuid=other),
        issued(key, signer=ec.generate_private_key(ec.SECP256R1())),
        AUTHORITY,
    ):
        with pytest.raises(EnrolmentRefusedError):
            check_certificate(certificate.public_bytes(DER), key, authority, UUID, 0)
    with pytest.raises(EnrolmentRefusedError, match="clocks"):
        check_certificate(good.public_bytes(DER), key, authority, UUID, good.not_valid_after_utc.timestamp())


@given(st.binary(max_size=300))
def test_any_bytes_are_a_certificate_or_refused(untrusted: bytes) -> None:
    with pytest.raises(EnrolmentRefusedError):
        check_certificate(untrusted, AgentKey.generate(), AUTHORITY.public_bytes(DER), UUID, 0)


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200))
def test_any_identity_is_refused_or_parsed(vm: bytes, authority: bytes, hypervisor: bytes) -> None:
    untrusted = agent_pb2.Identity(vm_certificate=vm, container_authority=authority, hypervisor_certificate=hypervisor)
    with pytest.raises(IdentityUnusableError):
        parse_identity(untrusted)
