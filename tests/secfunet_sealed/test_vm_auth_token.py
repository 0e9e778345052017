"""VM-Auth-Tokens: each refusal is reached by a token of its own."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given
from hypothesis import strategies as st

from secfunet.identity import thumbprint
from secfunet.vm_auth_token import (
    TokenError,
    TokenPrivateKey,
    TokenRefusal,
    TokenVerifier,
    VmAuthToken,
    algorithm_of,
    issue_token,
    key_id,
    unverified_claims,
    unverified_expiry,
)

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
KID = key_id(RSA_KEY.public_key())
VM, HYPERVISOR, OTHER = thumbprint(b"vm"), thumbprint(b"hypervisor"), thumbprint(b"other")
ISSUER, AUDIENCE = "urn:secfunet:grid:one", "https://sp.example"
NOW = 1_800_000_000
VERIFIER = TokenVerifier(ISSUER, AUDIENCE, {key_id(key.public_key()): key.public_key() for key in (RSA_KEY, EC_KEY)})


def token(key: TokenPrivateKey = RSA_KEY, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "vmid": VM,
        "hvid": HYPERVISOR,
        "operations": ["sign", "decrypt"],
        "issued_at": NOW,
        "expires_at": NOW + 3600,
        "jti": "one",
        **changes,
    }
    return issue_token(key, **arguments)


def verify(untrusted: str, *, now: float = NOW + 10, revoked: tuple[str, ...] = ()) -> VmAuthToken:
    return VERIFIER.verify(untrusted, vmid=VM, hvid=HYPERVISOR, now=now, is_revoked=lambda jti: jti in revoked)


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims(**changes: Any) -> dict[str, Any]:
    _, payload, _ = token().split(".")
    return {**json.loads(base64.urlsafe_b64decode(payload + "==")), **changes}


def forge(
    header: dict[str, Any] | bytes,
    payload: dict[str, Any] | bytes,
    sign: Callable[[bytes], bytes] | None = None,
) -> str:
    """A JWS of any header and payload, signed by the authority's key unless ``sign`` does it."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    signed = ".".join(map(b64, parts))
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    signature = sign(signed.encode()) if sign else RSA_KEY.sign(signed.encode(), pss, hashes.SHA256())
    return f"{signed}.{b64(signature)}"


HEADER = {"typ": "vm-auth+jwt", "alg": "PS256", "kid": KID}


@pytest.mark.parametrize("key", [RSA_KEY, EC_KEY], ids=["PS256", "ES256"])
def test_a_good_token_says_what_was_issued(key: TokenPrivateKey) -> None:
    issued = token(key)
    expected = VmAuthToken(
        "one", VM, HYPERVISOR, AUDIENCE, ISSUER, frozenset({"sign", "decrypt"}), NOW, NOW, NOW + 3600
    )
    assert verify(issued) == expected
    assert unverified_claims(issued) == expected
    assert unverified_expiry(issued) == NOW + 3600
    assert json.loads(base64.urlsafe_b64decode(issued.split(".")[0] + "==")) == {
        "typ": "vm-auth+jwt",
        "alg": algorithm_of(key),
        "kid": key_id(key.public_key()),
    }


def test_the_forger_of_these_tests_can_make_good_ones() -> None:
    assert verify(forge(HEADER, claims())).jti == "one"


def test_time_has_its_leeway_and_no_more() -> None:
    assert verify(token(), now=NOW - 5)
    assert verify(token(), now=NOW + 3604.9)


def _hmac(message: bytes) -> bytes:
    public = RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hmac.digest(public, message, "sha256")


def _pkcs1(message: bytes) -> bytes:
    return RSA_KEY.sign(message, padding.PKCS1v15(), hashes.SHA256())


def _changed(position: int) -> str:
    parts = token().split(".")
    raw = bytearray(base64.urlsafe_b64decode(parts[position] + "=="))
    raw[-2] ^= 1
    parts[position] = b64(bytes(raw))
    return ".".join(parts)


STRANGER = rsa.generate_private_key(65537, 2048)

REFUSED: list[tuple[str, Callable[[], str], TokenRefusal]] = [
    ("another issuer", lambda: token(issuer="urn:secfunet:grid:two"), TokenRefusal.ISSUER),
    ("another audience", lambda: token(audience="https://other.example"), TokenRefusal.AUDIENCE),
    ("another hypervisor", lambda: token(hvid=OTHER), TokenRefusal.HYPERVISOR),
    ("another VM", lambda: token(vmid=OTHER), TokenRefusal.VM),
    ("early", lambda: token(issued_at=NOW + 16), TokenRefusal.NOT_YET_VALID),
    ("early nbf", lambda: forge(HEADER, claims(nbf=NOW + 100)), TokenRefusal.NOT_YET_VALID),
    ("expired", lambda: token(issued_at=NOW - 100, expires_at=NOW + 5), TokenRefusal.EXPIRED),
    ("unsigned", lambda: forge({**HEADER, "alg": "none"}, claims(), lambda _: b""), TokenRefusal.ALGORITHM),
    (
        "none, kid too",
        lambda: forge({"typ": "vm-auth+jwt", "alg": "none"}, claims(), lambda _: b""),
        TokenRefusal.ALGORITHM,
    ),
    ("HMAC by public key", lambda: forge({**HEADER, "alg": "HS256"}, claims(), _hmac), TokenRefusal.ALGORITHM),
    ("RS256", lambda: forge({**HEADER, "alg": "RS256"}, claims(), _pkcs1), TokenRefusal.ALGORITHM),
    ("alg of another key", lambda: forge({**HEADER, "alg": "ES256"}, claims()), TokenRefusal.ALGORITHM),
    ("alg no string", lambda: forge({**HEADER, "alg": ["PS256"]}, claims()), TokenRefusal.ALGORITHM),
    ("unknown key", lambda: token(STRANGER), TokenRefusal.UNKNOWN_KEY),
    ("kid no string", lambda: forge({**HEADER, "kid": {}}, claims()), TokenRefusal.UNKNOWN_KEY),
    (
        "stranger under our kid",
        lambda: forge(
            HEADER,
            claims(),
            lambda m: STRANGER.sign(m, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
        ),
        TokenRefusal.SIGNATURE,
    ),
    (
        "changed claims",
        lambda: forge(HEADER, claims(), lambda _: base64.urlsafe_b64decode(token(vmid=OTHER).split(".")[2] + "==")),
        TokenRefusal.SIGNATURE,
    ),
    ("changed signature", lambda: _changed(2), TokenRefusal.SIGNATURE),
    ("empty signature", lambda: forge(HEADER, claims(), lambda _: b""), TokenRefusal.SIGNATURE),
    ("typ JWT", lambda: forge({**HEADER, "typ": "JWT"}, claims()), TokenRefusal.TYPE),
    ("no typ", lambda: forge({"alg": "PS256", "kid": KID}, claims()), TokenRefusal.TYPE),
    ("crit", lambda: forge({**HEADER, "crit": ["b64"], "b64": False}, claims()), TokenRefusal.MALFORMED),
    ("its own key", lambda: forge({**HEADER, "jwk": {}}, claims()), TokenRefusal.MALFORMED),
    ("oversize", lambda: "a" * 4097, TokenRefusal.OVERSIZE),
    ("garbage", lambda: "no token at all", TokenRefusal.MALFORMED),
    ("empty", lambda: "", TokenRefusal.MALFORMED),
    ("not ASCII", lambda: "é.é.é", TokenRefusal.MALFORMED),
    ("four parts", lambda: token() + ".", TokenRefusal.MALFORMED),
    ("padding", lambda: token() + "==", TokenRefusal.MALFORMED),
    ("header no object", lambda: forge(b"[]", claims()), TokenRefusal.MALFORMED),
    (
        "deep header",
        lambda: forge(b'{"a":' + b"[" * 1500 + b"]" * 1500 + b"}", b"{}", lambda _: b""),
        TokenRefusal.MALFORMED,
    ),
    ("alg twice", lambda: forge(b'{"typ":"vm-auth+jwt","alg":"none","alg":"PS256"}', claims()), TokenRefusal.MALFORMED),
    ("claims no JSON", lambda: forge(HEADER, b"\xff"), TokenRefusal.MALFORMED),
    ("NaN", lambda: forge(HEADER, b'{"iat":NaN}'), TokenRefusal.MALFORMED),
    ("no jti", lambda: forge(HEADER, {k: v for k, v in claims().items() if k != "jti"}), TokenRefusal.MALFORMED),
    ("a claim more", lambda: forge(HEADER, claims(admin=True)), TokenRefusal.MALFORMED),
    ("exp a string", lambda: forge(HEADER, claims(exp=str(NOW + 100))), TokenRefusal.MALFORMED),
    ("exp a truth", lambda: forge(HEADER, claims(exp=True)), TokenRefusal.MALFORMED),
    ("exp huge", lambda: forge(HEADER, claims(exp=10**400)), TokenRefusal.MALFORMED),
    ("cnf empty", lambda: forge(HEADER, claims(cnf={})), TokenRefusal.MALFORMED),
    ("cnf no thumbprint", lambda: forge(HEADER, claims(cnf={"x5t#S256": 1})), TokenRefusal.MALFORMED),
    ("sub short", lambda: forge(HEADER, claims(sub="x")), TokenRefusal.MALFORMED),
    ("audiences", lambda: forge(HEADER, claims(aud=[AUDIENCE])), TokenRefusal.MALFORMED),
    ("no operations", lambda: forge(HEADER, claims(ops=[])), TokenRefusal.MALFORMED),
    ("an unknown operation", lambda: forge(HEADER, claims(ops=["sign", "export"])), TokenRefusal.MALFORMED),
    ("an operation twice", lambda: forge(HEADER, claims(ops=["sign", "sign"])), TokenRefusal.MALFORMED),
    ("operations nested", lambda: forge(HEADER, claims(ops=[["sign"]])), TokenRefusal.MALFORMED),
]


@pytest.mark.parametrize(("make", "refusal"), [entry[1:] for entry in REFUSED], ids=[entry[0] for entry in REFUSED])
def test_refused(make: Callable[[], str], refusal: TokenRefusal) -> None:
    with pytest.raises(TokenError) as caught:
        verify(make())
    assert caught.value.refusal is refusal


def test_revoked() -> None:
    with pytest.raises(TokenError) as caught:
        verify(token(), revoked=("one",))
    assert caught.value.refusal is TokenRefusal.REVOKED


def test_every_refusal_has_a_test() -> None:
    assert {entry[2] for entry in REFUSED} | {TokenRefusal.REVOKED} == set(TokenRefusal)


@given(st.text(max_size=200))
def test_any_text_is_refused(untrusted: str) -> None:
    with pytest.raises(TokenError):
        verify(untrusted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(claims())), JSON)
def test_any_claim_is_accepted_or_refused(name: str, value: Any) -> None:
    """Signed by the authority's own key: the parser of the claims is what is tested."""
    try:
        accepted = verify(forge(HEADER, claims(**{name: value})))
    except TokenError:
        return
    assert accepted.vmid == VM


@given(st.sampled_from(sorted(HEADER)), JSON)
def test_any_header_is_accepted_or_refused(name: str, value: Any) -> None:
    try:
        accepted = verify(forge({**HEADER, name: value}, claims()))
    except TokenError:
        return
    assert accepted.vmid == VM


@given(st.integers(0, 773), st.characters(max_codepoint=127))
def test_any_changed_character_is_refused(position: int, character: str) -> None:
    good = token()
    changed = good[:position] + character + good[position + 1 :]
    if changed != good:
        with pytest.raises(TokenError):
            verify(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"operations": []},
        {"operations": ["export"]},
        {"vmid": "short"},
        {"expires_at": NOW},
        {"jti": "not base64url!"},
        {"issuer": ""},
        {"audience": "https://" + "a" * 5000},
    ],
    ids=str,
)
def test_no_token_is_issued_that_nobody_would_accept(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        token(**changes)


def test_weak_or_strange_authority_keys_are_refused() -> None:
    with pytest.raises(ValueError):
        token(ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(ValueError):
        TokenVerifier(ISSUER, AUDIENCE, {})


def test_whose_signature_the_results_have() -> None:
    assert verify(token()).from_card is False
    bound = token(from_card=True)
    assert verify(bound).from_card is True
    assert unverified_claims(bound).from_card is True
    assert json.loads(base64.urlsafe_b64decode(bound.split(".")[1] + "=="))["res"] == "card"
