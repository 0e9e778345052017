"""What key pairs do, checked with public keys outside the card and with the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.card import KeyAlgorithm
from secfunet.gose.v1 import operation_pb2
from secure_element.errors import CommandRefusedError
from secure_element.keys import KeyPair, generate_key

HASHES = {32: hashes.SHA256(), 48: hashes.SHA384(), 64: hashes.SHA512()}
RSA = KeyPair(generate_key(KeyAlgorithm.RSA_2048))
EC = KeyPair(generate_key(KeyAlgorithm.P_256))
SIGNATURES = operation_pb2.SignatureScheme
ENCRYPTIONS = operation_pb2.EncryptionScheme


def rsa_public() -> rsa.RSAPublicKey:
    key = load_der_public_key(RSA.public_key_der)
    assert isinstance(key, rsa.RSAPublicKey)
    return key


@pytest.mark.parametrize("algorithm", list(KeyAlgorithm))
def test_generated_keys_are_what_was_asked_for(algorithm: KeyAlgorithm) -> None:
    key = load_der_public_key(KeyPair(generate_key(algorithm)).public_key_der)
    kind, size = algorithm.name.split("_")
    assert isinstance(key, rsa.RSAPublicKey if kind == "RSA" else ec.EllipticCurvePublicKey)
    assert key.key_size == int(size)
    assert algorithm.is_rsa == (kind == "RSA")


def test_every_scheme_of_the_protocol_works_on_its_kind_of_key() -> None:
    for name, number in SIGNATURES.items():
        if number == 0:
            continue
        size = int(name[-3:]) // 8
        digest = bytes(range(size))
        digest_hash = HASHES[size]
        if "ECDSA" in name:
            for key in (EC, KeyPair(generate_key(KeyAlgorithm.P_384))):
                public = load_der_public_key(key.public_key_der)
                assert isinstance(public, ec.EllipticCurvePublicKey)
                public.verify(key.sign(number, digest), digest, ec.ECDSA(Prehashed(digest_hash)))
        else:
            pss = padding.PSS(padding.MGF1(digest_hash), size)
            form = pss if "PSS" in name else padding.PKCS1v15()
            rsa_public().verify(RSA.sign(number, digest), digest, form, Prehashed(digest_hash))
        other = RSA if "ECDSA" in name else EC
        for key, wrong in ((RSA, digest[1:]), (RSA, digest + b"\0"), (RSA, b""), (other, digest)):
            with pytest.raises(CommandRefusedError):
                key.sign(number, wrong)
    for _, number in ENCRYPTIONS.items():
        if number:
            assert RSA.decrypt(number, RSA.encrypt(number, b"message")) == b"message"
            with pytest.raises(CommandRefusedError):
                EC.decrypt(number, bytes(256))


def test_paddings_are_the_named_ones() -> None:
    public = rsa_public()
    forms = {
        ENCRYPTIONS.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256: padding.OAEP(
            padding.MGF1(hashes.SHA256()), hashes.SHA256(), None
        ),
        ENCRYPTIONS.ENCRYPTION_SCHEME_RSAES_OAEP_SHA1: padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None),  # noqa: S303
        ENCRYPTIONS.ENCRYPTION_SCHEME_RSAES_PKCS1_V1_5: padding.PKCS1v15(),
    }
    for scheme, form in forms.items():
        assert RSA.decrypt(scheme, public.encrypt(b"m", form)) == b"m"
    assert len(RSA.encrypt(1, bytes(190))) == 256
    with pytest.raises(CommandRefusedError):
        RSA.encrypt(1, bytes(191))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=256, max_size=256).map(lambda value: b"\0" + value[1:]))
def test_v1_5_tells_nobody_that_a_padding_was_wrong(ciphertext: bytes) -> None:
    """Any ciphertext below the modulus yields bytes, the same ones each time (implicit rejection): no Bleichenbacher oracle."""
    assert RSA.decrypt(3, ciphertext) == RSA.decrypt(3, ciphertext)
    content_key = RSA.unwrap(2, ciphertext)
    assert len(content_key) == 32
    assert RSA.unwrap(2, ciphertext) == content_key


def test_unwrap_has_one_failure() -> None:
    public = rsa_public()
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    content_key = bytes(range(32))
    assert RSA.unwrap(1, public.encrypt(content_key, oaep)) == content_key
    assert RSA.unwrap(2, public.encrypt(content_key, padding.PKCS1v15())) == content_key
    good = public.encrypt(content_key, oaep)
    wrong = [
        public.encrypt(bytes(31), oaep),
        public.encrypt(bytes(33), oaep),
        public.encrypt(content_key, padding.PKCS1v15()),
        good[:-1] + bytes((good[-1] ^ 1,)),
        good[:-1],
        bytes(256),
        b"\xff" * 256,
        b"",
    ]
    for header in wrong:
        with pytest.raises(CommandRefusedError) as refusal:
            RSA.unwrap(1, header)
        assert refusal.value.sw == 0x6A80
    # A key of the wrong length under v1.5 is answered like a wrong padding: by a made-up key.
    assert RSA.unwrap(2, public.encrypt(bytes(31), padding.PKCS1v15())) != bytes(31)


def test_requests_are_signed_by_their_key() -> None:
    for key in (RSA, EC, KeyPair(generate_key(KeyAlgorithm.P_384))):
        request = x509.load_der_x509_csr(key.certificate_request("vm-0001"))
        assert request.is_signature_valid
        assert request.subject.rfc4514_string() == "CN=vm-0001"
        public = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert public == key.public_key_der
    for name in ("", "x" * 65):
        with pytest.raises(CommandRefusedError):
            RSA.certificate_request(name)


@pytest.mark.interop
def test_openssl_verifies_and_encrypts(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("key.der", "digest", "signature", "plain", "sealed")}
    files["key.der"].write_bytes(RSA.public_key_der)
    files["digest"].write_bytes(bytes(range(32)))
    files["signature"].write_bytes(RSA.sign(4, bytes(range(32))))
    key = ["-pubin", "-keyform", "DER", "-inkey", str(files["key.der"])]
    subprocess.run(
        [
            *("openssl", "pkeyutl", "-verify", *key, "-in", str(files["digest"]), "-sigfile", str(files["signature"])),
            *("-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:32", "-pkeyopt", "digest:sha256"),
        ],
        check=True,
    )
    files["plain"].write_bytes(b"for the card")
    subprocess.run(
        [
            *("openssl", "pkeyutl", "-encrypt", *key, "-in", str(files["plain"]), "-out", str(files["sealed"])),
            *("-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:sha256"),
        ],
        check=True,
    )
    assert RSA.decrypt(1, files["sealed"].read_bytes()) == b"for the card"
