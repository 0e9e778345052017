"""btwoc, Diffie-Hellman, associations, nonces and the store."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openid.dh import DiffieHellman

from secfunet.openid.association import Association, AssociationKind, AssociationType, SessionType, check_handle
from secfunet.openid.diffie_hellman import (
    DEFAULT_MODULUS,
    DhGroup,
    DhKey,
    btwoc,
    decode_base64,
    decode_number,
    encode_number,
)
from secfunet.openid.errors import OpenIdFormatError
from secfunet.openid.nonce import make_nonce, nonce_time
from secfunet.openid.store import MemoryStore
from tests.secfunet_openid.world import NOW, Stream

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("number", "encoded"),
    [(0, "AA=="), (127, "fw=="), (128, "AIA="), (255, "AP8="), (32768, "AIAA")],
)
def test_the_numbers_of_the_specification(number: int, encoded: str) -> None:
    """§4.2."""
    assert encode_number(number) == encoded
    assert decode_number(encoded) == number


@given(st.integers(min_value=0, max_value=2**2048))
def test_numbers_come_back_and_btwoc_is_the_shortest_form(number: int) -> None:
    raw = btwoc(number)
    assert decode_number(encode_number(number)) == number
    assert not raw[0] & 0x80
    assert len(raw) == 1 or raw[0] != 0 or raw[1] & 0x80


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: base64.b64encode(raw).decode()))
def test_any_text_is_a_number_or_the_error(untrusted: str) -> None:
    with contextlib.suppress(OpenIdFormatError):
        assert decode_number(untrusted) >= 0


def test_the_default_modulus_is_that_of_the_other_library() -> None:
    assert DEFAULT_MODULUS == DiffieHellman.DEFAULT_MOD


@pytest.mark.parametrize(("hash_name", "size"), [("sha1", 20), ("sha256", 32)])
def test_both_sides_and_another_library_agree(hash_name: str, size: int) -> None:
    secret = Stream("secret")(size)
    for number in range(20):
        ours = DhKey.generate(DhGroup(), Stream(str(number)))
        theirs = DiffieHellman.fromDefaults()
        hidden = theirs.xorSecret(ours.public, secret, lambda data: hashlib.new(hash_name, data).digest())
        assert ours.mask(theirs.public, hidden, hash_name) == secret


@pytest.mark.parametrize("private", [1, 5, 1030, 2047])
def test_a_shared_secret_with_leading_zeros_or_a_top_bit_is_hashed_as_btwoc(private: int) -> None:
    """g = 2: the secret is 2 ** (x * y) mod p, so its size can be chosen."""
    key = DhKey(DhGroup(), private)
    shared = pow(2, private, DEFAULT_MODULUS)
    digest = hashlib.sha256(shared.to_bytes(shared.bit_length() // 8 + 1, "big")).digest()
    if shared == 2:
        assert digest == hashlib.sha256(b"\x02").digest()
    assert key.mask(2, bytes(32), "sha256") == digest


@pytest.mark.parametrize("public", [0, 1, DEFAULT_MODULUS - 1, DEFAULT_MODULUS, DEFAULT_MODULUS + 2])
def test_numbers_for_which_the_secret_is_known_are_refused(public: int) -> None:
    with pytest.raises(OpenIdFormatError):
        DhKey.generate(DhGroup(), Stream()).mask(public, bytes(32), "sha256")


@pytest.mark.parametrize("modulus", [0, 23, 2**1024, 2**512 + 1, 2**2048 + 1, 2**4096 + 1])
def test_moduli_that_are_refused(modulus: int) -> None:
    with pytest.raises(OpenIdFormatError):
        DhGroup(modulus=modulus)
    with pytest.raises(OpenIdFormatError):
        DhGroup(generator=1)


def test_base64_is_strict_and_bounded() -> None:
    for untrusted in ("a", "AA==\n", "A A=", "é", "AAAA" * 200):
        with pytest.raises(OpenIdFormatError):
            decode_base64(untrusted, limit=512)


def association(
    handle: str = "h", *, kind: AssociationKind = AssociationKind.SHARED, until: float = NOW
) -> Association:
    return Association(kind, "https://op.test/", handle, AssociationType.HMAC_SHA256, bytes(32), until)


def test_a_signature_covers_the_listed_fields_in_their_order() -> None:
    message = {"a": "1", "b": "2", "c": "3"}
    expected = hmac.digest(bytes(32), b"b:2\na:1\n", "sha256")
    assert association().sign(message, "b,a") == base64.b64encode(expected).decode()
    assert association().sign(message, "a,b") != association().sign(message, "b,a")
    for signed in ("", "a,a", "a,d", "a,"):
        with pytest.raises(OpenIdFormatError):
            association().sign(message, signed)


def test_an_association_shows_no_secret_and_has_the_size_of_its_type() -> None:
    assert "secret" not in repr(association())
    assert SessionType.DH_SHA1.fits(AssociationType.HMAC_SHA1)
    assert not SessionType.DH_SHA1.fits(AssociationType.HMAC_SHA256)
    with pytest.raises(OpenIdFormatError):
        Association(AssociationKind.SHARED, "https://op.test/", "h", AssociationType.HMAC_SHA1, bytes(32), NOW)


@pytest.mark.parametrize("handle", ["", "a b", "a\n", "é", "x" * 256])
def test_handles_that_are_none(handle: str) -> None:
    with pytest.raises(OpenIdFormatError):
        check_handle(handle)


@given(st.integers(min_value=0, max_value=253402300799), st.binary(min_size=12, max_size=12))
def test_nonces_come_back(now: int, salt: bytes) -> None:
    nonce = make_nonce(now, lambda _: salt)
    assert nonce_time(nonce) == now
    assert len(nonce) <= 255


@given(st.text(max_size=40) | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ.{0,8}", fullmatch=True))
def test_any_text_is_a_nonce_or_the_error(untrusted: str) -> None:
    with contextlib.suppress(OpenIdFormatError):
        nonce_time(untrusted)


@pytest.mark.parametrize(
    "untrusted",
    [
        "",
        "2026-02-30T00:00:00Zx",
        "2026-01-01T24:00:00Zx",
        "2026-01-01T00:00:00",
        "2026-01-01T00:00:00Z\n",
        "٢٠٢٦-01-01T00:00:00Z",
    ],
)
def test_nonces_that_are_none(untrusted: str) -> None:
    with pytest.raises(OpenIdFormatError):
        nonce_time(untrusted)


def test_the_store_is_bounded_and_forgets_what_has_expired() -> None:
    store = MemoryStore(max_associations=3)
    for number in range(5):
        store.save_association(association(f"h{number}", until=NOW + number))
    kind, endpoint = AssociationKind.SHARED, "https://op.test/"
    assert store.find_association(kind, endpoint, "h1", NOW) is None, "the oldest went first"
    assert store.find_association(kind, endpoint, "h2", NOW) is not None
    assert store.find_association(kind, endpoint, "h2", NOW + 2) is None, "it has expired"
    newest = store.find_association(kind, endpoint, None, NOW)
    assert newest is not None
    assert newest.handle == "h4"
    for other in (AssociationKind.PRIVATE, AssociationKind.RELYING):
        assert store.find_association(other, endpoint, "h4", NOW) is None, "kinds do not share handles"
    assert store.remove_association(kind, endpoint, "h4")
    assert not store.remove_association(kind, endpoint, "h4")


def test_a_nonce_counts_once_among_many_threads_and_a_full_store_lets_none_through() -> None:
    store = MemoryStore(max_nonces=2)
    won: list[bool] = []
    threads = [
        threading.Thread(target=lambda: won.append(store.use_nonce("op", "n", NOW + 10, NOW))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 1
    assert store.use_nonce("op", "m", NOW + 10, NOW)
    assert not store.use_nonce("op", "o", NOW + 10, NOW), "full: it cannot be remembered, so it does not count"
    assert store.use_nonce("op", "o", NOW + 30, NOW + 11), "the others have ended"
