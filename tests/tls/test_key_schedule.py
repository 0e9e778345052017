"""Published vectors: the TLS 1.2 PRF, a TLS 1.0 key block (draft-urien-eap-smartcard, annex 6), RFC 8448."""

from __future__ import annotations

import pytest

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import SUITES, suite_of
from secfunet.tls.errors import TlsError, TlsProtocolError, UnsupportedSuiteError
from secfunet.tls.key_schedule import (
    derive_secret,
    hkdf_expand_label,
    key_block_tls12,
    next_traffic_keys,
    prf_tls10,
    prf_tls12,
    split_hand_over,
    traffic_keys,
)
from secfunet.tls.protection import make_opener, make_sealer
from secfunet.tls.records import ContentType

# RFC 8448, 3: simple 1-RTT handshake, TLS_AES_128_GCM_SHA256.
CLIENT_SECRET = bytes.fromhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
SERVER_SECRET = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
CLIENT_RECORD = bytes.fromhex(
    "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2"
    "977014bd1e3deae63aeebb21694915e4"
)
PAYLOAD = bytes(range(50))


def test_prf_of_tls12_with_sha256() -> None:
    # Vectors of the TLS working group's list, "TLS 1.2 PRF test vectors".
    out = prf_tls12(
        "sha256",
        bytes.fromhex("9bbe436ba940f017b17652849a71db35"),
        b"test label",
        bytes.fromhex("a0ba9f936cda311827a6f796ffd5198c"),
        100,
    )
    assert out.hex() == (
        "e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a6b301791e90d35c9c9a46b4e14baf9af0fa022f7077def17"
        "abfd3797c0564bab4fbc91666e9def9b97fce34f796789baa48082d122ee42c5a72e5a5110fff70187347b66"
    )


def test_prf_of_tls12_with_sha384() -> None:
    out = prf_tls12(
        "sha384",
        bytes.fromhex("b80b733d6ceefcdc71566ea48e5567df"),
        b"test label",
        bytes.fromhex("cd665cf6a8447dd6ff8b27555edb7465"),
        148,
    )
    assert out.hex() == (
        "7b0c18e9ced410ed1804f2cfa34a336a1c14dffb4900bb5fd7942107e81c83cde9ca0faa60be9fe34f82b1233c9146a0e534cb400fed2700"
        "884f9dc236f80edd8bfa961144c9e8d792eca722a7b32fc3d416d473ebc2c5fd4abfdad05d9184259b5bf8cd4d90fa0d31e2dec479e4f1a2"
        "6066f2eea9a69236a3e52655c9e9aee691c8f3a26854308d5eaa3be85e0990703d73e56f"
    )


def test_prf_of_tls10_makes_the_key_block_of_the_smartcard_drafts_trace() -> None:
    client = bytes.fromhex("3FAA2B6A08BDD285B43D1F3BC9715FC9F85FC453FE58F3A9E07FF397CD653922")
    server = bytes.fromhex("3FAA2B9BCC3D6179E2D7E78460A2596342C5014289B753209CA02A31DEDB9142")
    pre_master = bytes.fromhex(
        "0301C5A68FB75123308E2DDBB27B63FE021E8724E7BC5C17078B3B3F90BA00D128F80B07AD786B6DE36E5F94FFDFEB49"
    )
    master = bytes.fromhex(
        "462683987D445827A5F4C157964DF20A3F3845D1515515ED1605596A4DCC1DE2D96969F3CA7BA31215FC52E54295AA92"
    )
    assert prf_tls10(pre_master, b"master secret", client + server, 48) == master
    assert prf_tls10(master, b"key expansion", server + client, 64) == bytes.fromhex(
        "9689DD6597F3CD21ECD73C757CFF079F756895B4F92BB2B0A391810643425246"
        "F04E1D9C77A94C647DD50F7734C7BBB6DF84904D5D29759F97B44B0A2E9154A7"
    )


def test_traffic_keys_of_rfc_8448() -> None:
    suite = SUITES[0x1301]
    client, server = split_hand_over(suite, CLIENT_SECRET + SERVER_SECRET)
    assert client.key.hex() == "17422dda596ed5d9acd890e3c63f5051"
    assert client.iv.hex() == "5b78923dee08579033e523d9"
    assert server.key.hex() == "9f02283b6c9c07efc26bb9f2ac92e356"
    assert server.iv.hex() == "cf782b88dd83549aadf1e984"


def test_derive_secret_of_rfc_8448() -> None:
    early = bytes.fromhex("33ad0a1c607ec03b09e6cd9893680ce210adf300aa1f2660e1b22e10f170f92a")
    derived = derive_secret("sha256", early, b"derived", b"")
    assert derived.hex() == "6f2615a108c702c5678f54fc9dbab69716c076189c48250cebeac3576c3611ba"


def test_application_record_of_rfc_8448() -> None:
    suite = SUITES[0x1301]
    keys = traffic_keys(suite, CLIENT_SECRET)
    sealer = make_sealer(suite, keys, 0, encrypt_then_mac=False, randbytes=bytes)
    out = bytearray(500)
    length = sealer.seal_into(ContentType.APPLICATION_DATA, PAYLOAD, memoryview(out))
    assert bytes(out[:length]) == CLIENT_RECORD
    opener = make_opener(suite, keys, 0, encrypt_then_mac=False)
    plain = bytearray(len(CLIENT_RECORD))
    assert opener.open_into(memoryview(CLIENT_RECORD), memoryview(plain)) == (ContentType.APPLICATION_DATA, 50)
    assert bytes(plain[:50]) == PAYLOAD


def test_key_update_changes_key_and_iv_and_needs_a_traffic_secret() -> None:
    suite = SUITES[0x1301]
    first = traffic_keys(suite, CLIENT_SECRET)
    second = next_traffic_keys(suite, first)
    assert second.secret == hkdf_expand_label("sha256", CLIENT_SECRET, b"traffic upd", b"", 32)
    assert len({first.key, second.key}) == 2
    assert len({first.iv, second.iv}) == 2
    tls12, _ = split_hand_over(SUITES[0xC02F], bytes(40))
    with pytest.raises(TlsProtocolError) as caught:
        next_traffic_keys(SUITES[0xC02F], tls12)
    assert caught.value.alert is AlertDescription.UNEXPECTED_MESSAGE


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_hand_over_is_cut_where_the_suite_says(suite) -> None:
    if suite.version == 0x0304:
        block = bytes(range(suite.hash_length)) * 2
    else:
        block = bytes(index % 251 for index in range(suite.key_block_length))
        assert len(key_block_tls12(suite, bytes(48), bytes(32), bytes(32))) == len(block)
    client, server = split_hand_over(suite, block)
    for keys in (client, server):
        assert (len(keys.key), len(keys.iv), len(keys.mac_key)) == (
            suite.key_length,
            suite.fixed_iv_length,
            suite.mac_length,
        )
        assert keys.key.hex() not in repr(keys)
    if suite.version == 0x0303:
        both = (client.mac_key, server.mac_key, client.key, server.key, client.iv, server.iv)
        assert b"".join(both) == block
    for wrong in (block[:-1], block + b"\0", b""):
        with pytest.raises(TlsError):
            split_hand_over(suite, wrong)


def test_legacy_suites_need_permission() -> None:
    assert suite_of(0x1301, allow_legacy=False).name == "TLS_AES_128_GCM_SHA256"
    assert suite_of(0x002F, allow_legacy=True).name == "TLS_RSA_WITH_AES_128_CBC_SHA"
    for number in (0x002F, 0xC013, 0x009C, 0x0005):
        with pytest.raises(UnsupportedSuiteError):
            suite_of(number, allow_legacy=False)
