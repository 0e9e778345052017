"""Trailers whose form is right, or wrong in one way, and the card's own signatures taken apart by hand."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from secfunet.container import ContainerError, ContainerProfile, verify_container
from secure_element.keys import KeyPair
from tests.vectors.rsa_forms import DIGEST_INFO, key, mgf1, modulus, pkcs8, private_operation, pss, signature_form, xor

HEADER, BODY = bytes(256), bytes(range(32))
SIGNED = HEADER + BODY
N = modulus()
PSS, PKCS1 = ContainerProfile.OAEP_PSS_SHA256, ContainerProfile.PKCS1_V1_5
HASHES = {1: "sha256", 2: "sha384", 3: "sha512", 4: "sha256", 5: "sha384", 6: "sha512"}


def is_accepted(trailer: bytes, profile: ContainerProfile, bits: int = 2048) -> bool:
    try:
        verified = verify_container(SIGNED + trailer, key(bits).public_key(), 256, profile)
    except ContainerError:
        return False
    assert (verified.header, verified.body) == (HEADER, BODY)
    return True


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_trailers_that_are_right(bits: int) -> None:
    assert is_accepted(private_operation(pss(SIGNED, bits=bits), bits), PSS, bits)
    assert is_accepted(private_operation(signature_form(SIGNED, size=bits // 8), bits), PKCS1, bits)


WRONG_PSS: dict[str, dict[str, Any]] = {
    "no salt": {"salt": 0},
    "a salt of 20": {"salt": 20},
    "a salt of 31": {"salt": 31},
    "a salt of 33": {"salt": 33},
    "a salt of 48": {"salt": 48},
    "the longest salt": {"salt": 222},
    "MGF1 with SHA-1": {"mgf_hash": "sha1"},
    "MGF1 with SHA-384": {"mgf_hash": "sha384"},
    "SHA-1": {"hash_name": "sha1"},
    "SHA-384": {"hash_name": "sha384"},
    "SHA-512": {"hash_name": "sha512"},
    "another last byte": {"trailer": 0xCC},
    "no separator": {"separator": 0},
    "a separator of 2": {"separator": 2},
}


@pytest.mark.parametrize("what", WRONG_PSS)
def test_pss_that_is_wrong(what: str) -> None:
    assert not is_accepted(private_operation(pss(SIGNED, **WRONG_PSS[what])), PSS)


def test_pss_over_something_else() -> None:
    assert not is_accepted(private_operation(pss(SIGNED[:-1])), PSS)
    assert not is_accepted(private_operation(pss(HEADER)), PSS)
    assert not is_accepted(private_operation(pss(hashlib.sha256(SIGNED).digest())), PSS)
    assert not is_accepted(private_operation(signature_form(SIGNED)), PSS)


INFO = bytes.fromhex(DIGEST_INFO["sha256"])
WRONG_PKCS1: dict[str, dict[str, Any]] = {
    "no parameters": {"digest_info": bytes.fromhex("302f300b0609608648016503040201") + b"\x04\x20"},
    "empty parameters": {"digest_info": bytes.fromhex("3030300c060960864801650304020105") + b"\x04\x20"},
    "a length of two bytes": {"digest_info": b"\x30\x81" + INFO[1:]},
    "a length of three bytes": {"digest_info": b"\x30\x82\x00" + INFO[1:]},
    "an indefinite length": {"digest_info": b"\x30\x80" + INFO[2:], "behind": b"\0\0"},
    "a long length of the hash": {"digest_info": b"\x30\x32" + INFO[2:-1] + b"\x81\x20"},
    "no DigestInfo": {"digest_info": b""},
    "another hash's DigestInfo": {"digest_info": bytes.fromhex(DIGEST_INFO["sha384"])},
    "SHA-1": {"hash_name": "sha1"},
    "SHA-384": {"hash_name": "sha384"},
    "SHA-512": {"hash_name": "sha512"},
    "bytes behind the hash": {"behind": b"\0" * 8},
    "bytes behind the hash, and short padding": {"fill": 8, "behind": bytes(180)},
    "short padding": {"fill": 8},
    "no padding": {"fill": 0},
    "padding of another byte": {"filler": 0xFE},
    "type 0": {"kind": 0, "filler": 0},
    "type 2": {"kind": 2},
}


@pytest.mark.parametrize("what", WRONG_PKCS1)
def test_v1_5_that_is_wrong(what: str) -> None:
    assert not is_accepted(private_operation(signature_form(SIGNED, **WRONG_PKCS1[what])), PKCS1)


@pytest.mark.parametrize("profile", list(ContainerProfile))
def test_numbers_and_lengths_that_are_none(profile: ContainerProfile) -> None:
    encoded = pss(SIGNED) if profile is PSS else signature_form(SIGNED)
    right = private_operation(encoded)
    assert is_accepted(right, profile)
    for number in (0, 1, N - 1, N, 2**2048 - 1):
        assert not is_accepted(number.to_bytes(256), profile)
    alias = int.from_bytes(right) + N
    if alias < 2**2048:
        assert not is_accepted(alias.to_bytes(256), profile), "the same signature, once around"
    for trailer in (b"", right[:-1], right + b"\0", b"\0" + right, right[1:], right + bytes(16), bytes(16) + right):
        assert not is_accepted(trailer, profile)


@pytest.mark.parametrize("bits", [2048, 3072])
@pytest.mark.parametrize("scheme", [1, 2, 3])
def test_what_the_card_signs_in_v1_5_is_byte_for_byte_right(scheme: int, bits: int) -> None:
    name = HASHES[scheme]
    signature = KeyPair(pkcs8(bits)).sign(scheme, hashlib.new(name, SIGNED).digest())
    assert signature == private_operation(signature_form(SIGNED, hash_name=name, size=bits // 8), bits)


@pytest.mark.parametrize("bits", [2048, 3072])
@pytest.mark.parametrize("scheme", [4, 5, 6])
def test_what_the_card_signs_in_pss_has_the_right_form_and_a_new_salt(scheme: int, bits: int) -> None:
    name, size = HASHES[scheme], bits // 8
    length = hashlib.new(name).digest_size
    salts = set()
    for _ in range(3):
        signature = KeyPair(pkcs8(bits)).sign(scheme, hashlib.new(name, SIGNED).digest())
        assert len(signature) == size
        encoded = pow(int.from_bytes(signature), 65537, modulus(bits)).to_bytes(size)
        masked, digest, last = encoded[: -length - 1], encoded[-length - 1 : -1], encoded[-1]
        block = bytearray(xor(masked, mgf1(digest, len(masked), name)))
        block[0] &= 0x7F
        zeros = len(block) - 1 - length
        assert (encoded[0] & 0x80, last) == (0, 0xBC)
        assert block[: zeros + 1] == bytes(zeros) + b"\1"
        salt = bytes(block[zeros + 1 :])
        assert hashlib.new(name, bytes(8) + hashlib.new(name, SIGNED).digest() + salt).digest() == digest
        salts.add(salt)
    assert len(salts) == 3
