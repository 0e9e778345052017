"""Every suite: round trip, any change refused, lengths bounded, one error."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import SUITES, Cipher, CipherSuite
from secfunet.tls.errors import BadRecordMacError, KeyUsageLimitError, RecordError, TlsProtocolError
from secfunet.tls.key_schedule import DirectionKeys, split_hand_over
from secfunet.tls.protection import (
    MAX_EXPANSION,
    MAX_SEQUENCE,
    RecordOpener,
    RecordSealer,
    make_opener,
    make_sealer,
)
from secfunet.tls.records import HEADER_LENGTH, MAX_PLAINTEXT, ContentType

VARIANTS = [
    (suite, etm) for suite in SUITES.values() for etm in ((False, True) if suite.cipher is Cipher.AES_CBC else (False,))
]
variants = pytest.mark.parametrize(
    ("suite", "etm"), VARIANTS, ids=[f"{suite.name}{'-etm' if etm else ''}" for suite, etm in VARIANTS]
)


def keys_of(suite: CipherSuite) -> DirectionKeys:
    length = 2 * suite.hash_length if suite.version == 0x0304 else suite.key_block_length
    return split_hand_over(suite, hashlib.shake_128(suite.name.encode()).digest(length))[0]


def pair(suite: CipherSuite, etm: bool, sequence: int = 0) -> tuple[RecordSealer, RecordOpener]:
    keys = keys_of(suite)
    return (
        make_sealer(suite, keys, sequence, encrypt_then_mac=etm, randbytes=os.urandom),
        make_opener(suite, keys, sequence, encrypt_then_mac=etm),
    )


def seal(sealer: RecordSealer, kind: int, content: bytes) -> bytes:
    out = bytearray(len(content) + MAX_EXPANSION)
    with memoryview(out) as view:
        length = sealer.seal_into(kind, content, view)
    return bytes(out[:length])


def open_record(opener: RecordOpener, record: bytes) -> tuple[int, bytes]:
    out = bytearray(len(record))
    with memoryview(out) as view:
        kind, length = opener.open_into(memoryview(record), view)
    return kind, bytes(out[:length])


@variants
def test_round_trip_of_every_kind_and_many_lengths(suite: CipherSuite, etm: bool) -> None:
    sealer, opener = pair(suite, etm, 1)
    for length in (0, 1, 15, 16, 17, 31, 32, 255, 1000, MAX_PLAINTEXT):
        for kind in (ContentType.APPLICATION_DATA, ContentType.ALERT, ContentType.HANDSHAKE):
            content = os.urandom(length)
            record = seal(sealer, kind, content)
            assert len(record) == HEADER_LENGTH + int.from_bytes(record[3:5], "big")
            assert open_record(opener, record) == (kind, content)
    assert sealer.sequence == opener.sequence == 31


@variants
def test_every_changed_bit_is_refused(suite: CipherSuite, etm: bool) -> None:
    record = seal(pair(suite, etm)[0], ContentType.APPLICATION_DATA, b"attack at dawn")
    for bit in range(8 * len(record)):
        if 24 <= bit < 40:
            # The length says where the record ends: a change of it is a change of what is given to the opener.
            continue
        changed = bytearray(record)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TlsProtocolError):
            open_record(pair(suite, etm)[1], bytes(changed))


@variants
def test_order_replay_and_length_are_protected(suite: CipherSuite, etm: bool) -> None:
    sealer, opener = pair(suite, etm)
    first = seal(sealer, ContentType.APPLICATION_DATA, b"one")
    second = seal(sealer, ContentType.APPLICATION_DATA, b"two")
    with pytest.raises(BadRecordMacError):
        open_record(pair(suite, etm)[1], second)
    assert open_record(opener, first)[1] == b"one"
    with pytest.raises(BadRecordMacError):
        open_record(opener, first)
    for length in range(HEADER_LENGTH, len(first)):
        cut = first[:3] + (length - HEADER_LENGTH).to_bytes(2, "big") + first[HEADER_LENGTH:length]
        with pytest.raises(BadRecordMacError):
            open_record(pair(suite, etm)[1], cut)


@variants
def test_more_than_a_records_content_is_an_overflow(suite: CipherSuite, etm: bool) -> None:
    sealer, opener = pair(suite, etm)
    if suite.version == 0x0304:
        # Our sealer cannot make one: a peer's would look like this.
        from secfunet.tls.protection import _aead

        header = b"\x17\x03\x03" + (MAX_PLAINTEXT + 2 + 16).to_bytes(2, "big")
        inner = bytes(MAX_PLAINTEXT + 1) + b"\x17"
        record = header + _aead(suite, keys_of(suite)).encrypt(keys_of(suite).iv, inner, header)
    else:
        record = seal(sealer, ContentType.APPLICATION_DATA, bytes(MAX_PLAINTEXT + 1))
    with pytest.raises(RecordError) as caught:
        open_record(opener, record)
    assert caught.value.alert is AlertDescription.RECORD_OVERFLOW


@variants
def test_sequence_numbers_do_not_wrap(suite: CipherSuite, etm: bool) -> None:
    sealer, opener = pair(suite, etm, MAX_SEQUENCE - 1)
    assert open_record(opener, seal(sealer, 23, b"last")) == (23, b"last")
    with pytest.raises(KeyUsageLimitError):
        seal(sealer, 23, b"one too many")
    with pytest.raises(RecordError):
        open_record(opener, seal(pair(suite, etm)[0], 23, b"one too many"))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VARIANTS), st.binary(max_size=400), st.sampled_from([20, 21, 22, 23]))
def test_any_bytes_are_refused_with_the_documented_error(variant, fragment: bytes, kind: int) -> None:
    record = bytes((kind, 3, 3)) + len(fragment).to_bytes(2, "big") + fragment
    with pytest.raises((BadRecordMacError, RecordError)):
        open_record(pair(*variant)[1], record)


def test_padding_of_tls13_is_taken_off_and_must_not_be_all() -> None:
    from secfunet.tls.protection import _aead

    suite = SUITES[0x1301]
    keys = keys_of(suite)

    def record(inner: bytes) -> bytes:
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        return header + _aead(suite, keys).encrypt(keys.iv, inner, header)

    assert open_record(pair(suite, False)[1], record(b"data\x17" + bytes(100))) == (23, b"data")
    assert open_record(pair(suite, False)[1], record(b"\x17" + bytes(3))) == (23, b"")
    with pytest.raises(RecordError) as caught:
        open_record(pair(suite, False)[1], record(bytes(20)))
    assert caught.value.alert is AlertDescription.UNEXPECTED_MESSAGE
    # TLSInnerPlaintext has at most 2^14 + 1 bytes, type and padding included (RFC 8446, 5.4), whatever part of it is padding.
    for size in (0, 1, 100, MAX_PLAINTEXT):
        content = bytes([7]) * size
        full = content + b"\x17" + bytes(MAX_PLAINTEXT - size)
        assert open_record(pair(suite, False)[1], record(full)) == (23, content)
        with pytest.raises(RecordError) as caught:
            open_record(pair(suite, False)[1], record(full + b"\0"))
        assert caught.value.alert is AlertDescription.RECORD_OVERFLOW


def test_wrong_padding_and_wrong_mac_are_one_error() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher as BlockCipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CBC

    suite = SUITES[0x002F]
    keys = keys_of(suite)
    texts = set()
    for plain in (bytes(64), b"\xff" * 64, b"\x0f" * 16 * 4, bytes(range(64))):
        encryptor = BlockCipher(AES(keys.key), CBC(bytes(16))).encryptor()
        fragment = bytes(16) + encryptor.update(plain) + encryptor.finalize()
        record = b"\x17\x03\x03" + len(fragment).to_bytes(2, "big") + fragment
        with pytest.raises(BadRecordMacError) as caught:
            open_record(pair(suite, False)[1], record)
        texts.add((str(caught.value), caught.value.alert, caught.value.__cause__))
    assert len(texts) == 1
