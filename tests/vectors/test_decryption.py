"""Ciphertexts and headers whose padding is right, or wrong in one way, through the card's keys.

Under OAEP whatever is wrong is one error. Under v1.5 nothing below the modulus is an error: it yields bytes that look random, the same ones
for the same ciphertext, and 32 of them for a header. A number that is not below the modulus is refused; anybody can tell those apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from secure_element.errors import CommandRefusedError, Sw
from secure_element.keys import KeyPair
from tests.vectors.rsa_forms import modulus, nonzero, oaep, pkcs8, public_operation, v1_5

OAEP_SHA256, OAEP_SHA1, PKCS1 = 1, 2, 3
OAEP_PROFILE, PKCS1_PROFILE = 1, 2
PAIR = KeyPair(pkcs8())
N = modulus()
CONTENT_KEY = bytes(range(32))


def refused(act: Callable[[], bytes]) -> None:
    with pytest.raises(CommandRefusedError) as caught:
        act()
    assert caught.value.sw == Sw.WRONG_DATA
    assert caught.value.__cause__ is None, "one error for whatever is wrong"


@pytest.mark.parametrize("message", [b"", b"x", CONTENT_KEY, bytes(190)])
@pytest.mark.parametrize(("scheme", "hash_name"), [(OAEP_SHA256, "sha256"), (OAEP_SHA1, "sha1")])
def test_oaep_that_is_right(scheme: int, hash_name: str, message: bytes) -> None:
    ciphertext = public_operation(oaep(message, hash_name=hash_name))
    assert PAIR.decrypt(scheme, ciphertext) == message
    if scheme == OAEP_SHA256:
        if len(message) == 32:
            assert PAIR.unwrap(OAEP_PROFILE, ciphertext) == message
        else:
            refused(lambda: PAIR.unwrap(OAEP_PROFILE, ciphertext))


WRONG_OAEP = {
    "a label": lambda: oaep(CONTENT_KEY, label=b"label"),
    "SHA-1": lambda: oaep(CONTENT_KEY, hash_name="sha1"),
    "SHA-384": lambda: oaep(CONTENT_KEY, hash_name="sha384"),
    "SHA-512": lambda: oaep(CONTENT_KEY, hash_name="sha512"),
    "MGF1 with SHA-1": lambda: oaep(CONTENT_KEY, mgf_hash="sha1"),
    "MGF1 with SHA-512": lambda: oaep(CONTENT_KEY, mgf_hash="sha512"),
    "a first byte of 1": lambda: oaep(CONTENT_KEY, first=1),
    "no separator": lambda: oaep(bytes(32), separator=0),
    "a separator of 2": lambda: oaep(CONTENT_KEY, separator=2),
    "a padding that is not zero": lambda: oaep(CONTENT_KEY, padding=3),
    "v1.5": lambda: v1_5(CONTENT_KEY),
    "nothing but zeros": lambda: bytes(256),
}


@pytest.mark.parametrize("what", WRONG_OAEP)
def test_oaep_that_is_wrong(what: str) -> None:
    ciphertext = public_operation(WRONG_OAEP[what]())
    refused(lambda: PAIR.decrypt(OAEP_SHA256, ciphertext))
    refused(lambda: PAIR.unwrap(OAEP_PROFILE, ciphertext))


@pytest.mark.parametrize("message", [b"", b"x", CONTENT_KEY, bytes(245)])
def test_v1_5_that_is_right(message: bytes) -> None:
    ciphertext = public_operation(v1_5(message))
    assert PAIR.decrypt(PKCS1, ciphertext) == message
    made_up = PAIR.unwrap(PKCS1_PROFILE, ciphertext)
    assert len(made_up) == 32
    assert (made_up == message) == (len(message) == 32)
    assert made_up == PAIR.unwrap(PKCS1_PROFILE, ciphertext)


WRONG_V1_5 = {
    "type 0": lambda: v1_5(CONTENT_KEY, kind=0),
    "type 1": lambda: v1_5(CONTENT_KEY, kind=1),
    "type 3": lambda: v1_5(CONTENT_KEY, kind=3),
    "a first byte of 1": lambda: v1_5(CONTENT_KEY, first=1),
    "no zero": lambda: b"\0\2" + nonzero(254),
    "a zero at once": lambda: b"\0\2\0" + nonzero(253),
    "seven bytes of padding": lambda: b"\0\2" + nonzero(7) + b"\0" + nonzero(246),
    "nothing but zeros": lambda: bytes(256),
    "nothing but a type": lambda: b"\0\2" + bytes(254),
    "OAEP": lambda: oaep(CONTENT_KEY),
}


@pytest.mark.parametrize("what", WRONG_V1_5)
def test_v1_5_that_is_wrong_is_no_error(what: str) -> None:
    ciphertext = public_operation(WRONG_V1_5[what]())
    first = PAIR.decrypt(PKCS1, ciphertext)
    assert first == PAIR.decrypt(PKCS1, ciphertext), "the same ciphertext yields the same bytes"
    made_up = PAIR.unwrap(PKCS1_PROFILE, ciphertext)
    assert len(made_up) == 32
    assert made_up not in {CONTENT_KEY, bytes(32)}
    assert made_up == KeyPair(pkcs8()).unwrap(PKCS1_PROFILE, ciphertext), "after a power cut, too"
    other = public_operation(WRONG_V1_5[what]()) if what != "nothing but zeros" else None
    if other not in {None, ciphertext}:
        assert PAIR.unwrap(PKCS1_PROFILE, other) != made_up


@pytest.mark.parametrize("number", [0, 1, N - 1], ids=["0", "1", "n-1"])
def test_a_header_below_the_modulus_always_yields_32_bytes(number: int) -> None:
    header = number.to_bytes(256)
    assert len(PAIR.unwrap(PKCS1_PROFILE, header)) == 32
    assert PAIR.unwrap(PKCS1_PROFILE, header) == PAIR.unwrap(PKCS1_PROFILE, header)
    PAIR.decrypt(PKCS1, header)
    refused(lambda: PAIR.unwrap(OAEP_PROFILE, header))
    refused(lambda: PAIR.decrypt(OAEP_SHA256, header))


@pytest.mark.parametrize("number", [N, N + 1, 2**2048 - 1], ids=["n", "n+1", "2^2048-1"])
def test_a_header_that_is_not_below_the_modulus_is_refused(number: int) -> None:
    header = number.to_bytes(256)
    for profile in (OAEP_PROFILE, PKCS1_PROFILE):
        refused(lambda profile=profile: PAIR.unwrap(profile, header))  # type: ignore[misc]  # a default binds it
    for scheme in (OAEP_SHA256, OAEP_SHA1, PKCS1):
        refused(lambda scheme=scheme: PAIR.decrypt(scheme, header))  # type: ignore[misc]


@pytest.mark.parametrize("size", [0, 1, 128, 255, 257, 512])
@pytest.mark.parametrize("profile", [OAEP_PROFILE, PKCS1_PROFILE])
def test_another_length_than_the_modulus_is_refused(profile: int, size: int) -> None:
    right = public_operation(v1_5(CONTENT_KEY))
    refused(lambda: PAIR.unwrap(profile, (bytes(256) + right)[-size:] if size else b""))
    refused(lambda: PAIR.decrypt(3, (right + bytes(256))[:size]))
