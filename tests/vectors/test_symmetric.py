"""AES-256-CBC bodies and AES-CMAC, against forms made here and the vectors of RFC 4493."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from secfunet.container import ContainerError, VerifiedContainer
from secfunet.scp03.keys import cmac

KEY, IV = bytes(range(32)), bytes(range(100, 116))


def body(padded: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES256(KEY), modes.CBC(IV)).encryptor()
    return IV + encryptor.update(padded) + encryptor.finalize()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 100])
def test_a_right_padding(size: int) -> None:
    plaintext = os.urandom(size)
    fill = 16 - size % 16
    assert VerifiedContainer(b"", body(plaintext + bytes((fill,)) * fill)).open(KEY) == plaintext


WRONG = {
    "none": b"sixteen bytes of",
    "0": bytes(15) + b"\x00",
    "17": b"\x11" * 32,
    "32": b"\x20" * 32,
    "255": b"\xff" * 16,
    "128 of 16": bytes(15) + b"\x80",
    "unequal bytes": bytes(12) + b"\x03\x04\x04\x04",
    "the first unequal": b"\x0f" + b"\x10" * 15,
    "one too few": bytes(13) + b"\x04\x04\x04",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_padding_is_the_one_error(what: str) -> None:
    with pytest.raises(ContainerError) as caught:
        VerifiedContainer(b"", body(WRONG[what])).open(KEY)
    assert str(caught.value) == "the container is refused"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("cut", [16, 17, 24, 31, 33, 40, 47])
def test_no_block_and_half_a_block(cut: int) -> None:
    with pytest.raises(ContainerError):
        VerifiedContainer(b"", body(b"x" * 16 + b"\x10" * 16)[:cut]).open(KEY)


@pytest.mark.parametrize("size", [0, 16, 24, 31, 33, 64])
def test_keys_of_another_length(size: int) -> None:
    with pytest.raises(ContainerError):
        VerifiedContainer(b"", body(b"\x10" * 16)).open(bytes(size))


# RFC 4493, 4.
RFC_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
MESSAGE = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
RFC_4493 = {
    0: "bb1d6929e95937287fa37d129b756746",
    16: "070a16b46b4d4144f79bdd9dd04a287c",
    40: "dfa66747de9ae63030ca32611497c827",
    64: "51f0bebf7e3b9d92fc49741779363cfe",
}


@pytest.mark.parametrize("size", RFC_4493)
def test_cmac_of_the_rfc(size: int) -> None:
    assert cmac(RFC_KEY, MESSAGE[:size]).hex() == RFC_4493[size]


def by_hand(key: bytes, data: bytes) -> bytes:
    """AES-CMAC from AES alone (RFC 4493, 2.3 and 2.4)."""

    def encrypt(block: bytes) -> bytes:
        encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305  # one block of CMAC
        return encryptor.update(block) + encryptor.finalize()

    def double(block: bytes) -> bytes:
        number = int.from_bytes(block) << 1
        return ((number & (2**128 - 1)) ^ (0x87 if number >> 128 else 0)).to_bytes(16)

    one = double(encrypt(bytes(16)))
    is_whole = bool(data) and len(data) % 16 == 0
    blocks = [data[at : at + 16] for at in range(0, len(data), 16)] or [b""]
    last = blocks.pop()
    last = last if is_whole else last + b"\x80" + bytes(15 - len(last))
    blocks.append(bytes(a ^ b for a, b in zip(last, one if is_whole else double(one), strict=True)))
    state = bytes(16)
    for block in blocks:
        state = encrypt(bytes(a ^ b for a, b in zip(state, block, strict=True)))
    return state


@pytest.mark.parametrize("key_size", [16, 24, 32])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 255])
def test_cmac_by_hand(key_size: int, size: int) -> None:
    key, data = os.urandom(key_size), os.urandom(size)
    tag = cmac(key, data)
    assert tag == by_hand(key, data)
    assert len(tag) == 16
    if data:
        for changed in (
            bytes((data[0] ^ 1,)) + data[1:],
            data[:-1] + bytes((data[-1] ^ 0x80,)),
            data + b"\0",
            data[:-1],
        ):
            assert cmac(key, changed) != tag
