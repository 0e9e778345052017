"""The EAP-TLS trace of draft-urien-eap-smartcard, annex 6 (TLS 1.0, RSA, RC4-128-MD5): its keys, recomputed."""

import hashlib
import hmac

import pytest

from secfunet.tls.key_schedule import prf_tls10

CLIENT_RANDOM = bytes.fromhex("3FAA2B6A08BDD285B43D1F3BC9715FC9F85FC453FE58F3A9E07FF397CD653922")
SERVER_RANDOM = bytes.fromhex("3FAA2B9BCC3D6179E2D7E78460A2596342C5014289B753209CA02A31DEDB9142")
PRE_MASTER = bytes.fromhex(
    "0301C5A68FB75123308E2DDBB27B63FE021E8724E7BC5C17078B3B3F90BA00D128F80B07AD786B6DE36E5F94FFDFEB49"
)
MASTER = bytes.fromhex(
    "462683987D445827A5F4C157964DF20A3F3845D1515515ED1605596A4DCC1DE2D96969F3CA7BA31215FC52E54295AA92"
)
KEY_BLOCK = bytes.fromhex(
    "9689DD6597F3CD21ECD73C757CFF079F756895B4F92BB2B0A391810643425246"
    "F04E1D9C77A94C647DD50F7734C7BBB6DF84904D5D29759F97B44B0A2E9154A7"
)
CLIENT_VERIFY_DATA = bytes.fromhex("05B9E69FA86DF19196E9A064")
CLIENT_FINISHED_RECORD = bytes.fromhex("C97EBCFF0C20271CAE21FAA80898278660D393CB4C640390CDEB14592A0392F7")


def rc4(key: bytes, data: bytes) -> bytes:
    state = list(range(256))
    j = 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) & 0xFF
        state[i], state[j] = state[j], state[i]
    i = j = 0
    out = bytearray()
    for byte in data:
        i = (i + 1) & 0xFF
        j = (j + state[i]) & 0xFF
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) & 0xFF])
    return bytes(out)


def test_master_secret() -> None:
    assert prf_tls10(PRE_MASTER, b"master secret", CLIENT_RANDOM + SERVER_RANDOM, 48) == MASTER


def test_key_block() -> None:
    assert prf_tls10(MASTER, b"key expansion", SERVER_RANDOM + CLIENT_RANDOM, 64) == KEY_BLOCK


def test_client_finished_record() -> None:
    """MAC and cipher keys stand where RFC 5246, 6.3 puts them: the published record is recomputed from the key block."""
    mac_key, key = KEY_BLOCK[:16], KEY_BLOCK[32:48]
    finished = bytes.fromhex("1400000C") + CLIENT_VERIFY_DATA
    header = bytes(8) + bytes.fromhex("1603010010")
    mac = hmac.new(mac_key, header + finished, hashlib.md5).digest()
    assert rc4(key, finished + mac) == CLIENT_FINISHED_RECORD


def test_session_key() -> None:
    """MSK ‖ EMSK of RFC 5216, 2.3. The published card gave the halves of the MSK in the other order: 8F0A6773…2C6D ‖ B7CD0C7D…5E84."""
    keys = prf_tls10(MASTER, b"client EAP encryption", CLIENT_RANDOM + SERVER_RANDOM, 128)
    msk = keys[:64]
    as_traced = msk[32:] + msk[:32]
    assert as_traced[:4] == bytes.fromhex("8F0A6773")
    assert as_traced[30:32] == bytes.fromhex("2C6D")
    assert as_traced[32:36] == bytes.fromhex("B7CD0C7D")
    assert as_traced[62:] == bytes.fromhex("5E84")


@pytest.mark.parametrize("length", [0, 1, 12, 64, 128])
def test_prf_is_a_stream(length: int) -> None:
    assert prf_tls10(MASTER, b"x", CLIENT_RANDOM, 128)[:length] == prf_tls10(MASTER, b"x", CLIENT_RANDOM, length)
