"""Key pairs and what they can do. A private key is made here and used here; no function gives one to a caller outside the card."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from secfunet.card.parameters import KeyAlgorithm
from secure_element.errors import CommandRefusedError, Sw

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

CONTENT_KEY_SIZE: Final = 32

_RSA_BITS: Final = {KeyAlgorithm.RSA_2048: 2048, KeyAlgorithm.RSA_3072: 3072, KeyAlgorithm.RSA_4096: 4096}

_SHA256, _SHA384, _SHA512 = hashes.SHA256(), hashes.SHA384(), hashes.SHA512()

# Numbers of secfunet.gose.v1 SignatureScheme.
_PKCS1_SIGNATURES: Final[dict[int, hashes.HashAlgorithm]] = {1: _SHA256, 2: _SHA384, 3: _SHA512}
_PSS_SIGNATURES: Final[dict[int, hashes.HashAlgorithm]] = {4: _SHA256, 5: _SHA384, 6: _SHA512}
_ECDSA_SIGNATURES: Final[dict[int, hashes.HashAlgorithm]] = {7: _SHA256, 8: _SHA384}

# Numbers of secfunet.gose.v1 EncryptionScheme.
_RSAES_OAEP_SHA256: Final = 1
_RSAES_OAEP_SHA1: Final = 2
_RSAES_PKCS1_V1_5: Final = 3

# Numbers of secfunet.container.ContainerProfile.
_PROFILE_SCHEMES: Final = {1: _RSAES_OAEP_SHA256, 2: _RSAES_PKCS1_V1_5}

_FIRST_OPENSSL_WITH_IMPLICIT_REJECTION: Final = 0x30200000


def generate_key(algorithm: KeyAlgorithm) -> bytes:
    """A new private key, PKCS#8 in DER, for the store and nothing else. RSA-4096 may take many seconds; the GIL is free meanwhile."""
    key: PrivateKey
    if algorithm in _RSA_BITS:
        key = rsa.generate_private_key(65537, _RSA_BITS[algorithm])
    else:
        key = ec.generate_private_key(ec.SECP256R1() if algorithm is KeyAlgorithm.P_256 else ec.SECP384R1())
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class KeyPair:
    """A private key in memory, parsed once, and its operations. They raise CommandRefusedError: 6A80 wrong data, 6A81 not for this key."""

    def __init__(self, pkcs8: bytes) -> None:
        # The store is authenticated: checking that p and q are prime again would only make every start slower.
        key = serialization.load_der_private_key(pkcs8, None, unsafe_skip_rsa_key_validation=True)
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise CommandRefusedError(Sw.INTERNAL)
        self._key: PrivateKey = key
        self._rejection_secret = HKDF(_SHA256, 32, None, b"implicit rejection of a content key").derive(pkcs8)

    @property
    def private_key(self) -> PrivateKey:
        """For the card's own TLS stack, in this process."""
        return self._key

    @property
    def size(self) -> int:
        """Bytes of its modulus; of a coordinate, if it is on a curve."""
        return (self._key.key_size + 7) // 8

    @property
    def public_key_der(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, scheme: int, digest: bytes) -> bytes:
        """A signature of ``digest``, which must be as long as the scheme's hash (RFC 8017, 8; ECDSA in DER, RFC 3279, 2.2.3)."""
        hash_algorithm = (_PKCS1_SIGNATURES | _PSS_SIGNATURES | _ECDSA_SIGNATURES).get(scheme)
        if hash_algorithm is None:
            raise CommandRefusedError(Sw.NOT_SUPPORTED)
        if len(digest) != hash_algorithm.digest_size:
            raise CommandRefusedError(Sw.WRONG_DATA)
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            if scheme not in _ECDSA_SIGNATURES:
                raise CommandRefusedError(Sw.NOT_SUPPORTED)
            return self._key.sign(digest, ec.ECDSA(Prehashed(hash_algorithm)))
        if scheme in _PKCS1_SIGNATURES:
            return self._key.sign(digest, padding.PKCS1v15(), Prehashed(hash_algorithm))
        if scheme in _PSS_SIGNATURES:
            pss = padding.PSS(padding.MGF1(hash_algorithm), hash_algorithm.digest_size)
            return self._key.sign(digest, pss, Prehashed(hash_algorithm))
        raise CommandRefusedError(Sw.NOT_SUPPORTED)

    def decrypt(self, scheme: int, ciphertext: bytes) -> bytes:
        """The plaintext (RFC 8017, 7). A wrong v1.5 padding yields bytes that look random, the same ones each time, and never an error.

        6A80 for a ciphertext of another length than the modulus, or not below it; under OAEP for whatever is wrong.
        """
        key, encryption = self._rsa(scheme)
        if len(ciphertext) != key.key_size // 8:
            raise CommandRefusedError(Sw.WRONG_DATA)
        try:
            return key.decrypt(ciphertext, encryption)
        except ValueError:
            raise CommandRefusedError(Sw.WRONG_DATA) from None

    def encrypt(self, scheme: int, plaintext: bytes) -> bytes:
        """The ciphertext, as long as the modulus; 6A80 if the plaintext is too long for it."""
        key, encryption = self._rsa(scheme)
        try:
            return key.public_key().encrypt(plaintext, encryption)
        except ValueError:
            raise CommandRefusedError(Sw.WRONG_DATA) from None

    def unwrap(self, profile: int, header: bytes) -> bytes:
        """A container's content key of 32 bytes; one error for whatever is wrong.

        Under the v1.5 profile a header of the right length and below the modulus has no error at all: a wrong padding, or a key of another
        length, yields a key made from the header (as TLS has done it since RFC 5246, 7.4.7.1), so that the card tells nobody which paddings
        were right. A number that is not below the modulus is refused: everybody knows the modulus.
        """
        scheme = _PROFILE_SCHEMES.get(profile)
        if scheme is None:
            raise CommandRefusedError(Sw.NOT_SUPPORTED)
        content_key = self.decrypt(scheme, header)
        if len(content_key) == CONTENT_KEY_SIZE:
            return content_key
        if scheme == _RSAES_PKCS1_V1_5:
            return hmac.digest(self._rejection_secret, header, "sha256")
        raise CommandRefusedError(Sw.WRONG_DATA)

    def certificate_request(self, common_name: str) -> bytes:
        """A PKCS#10 request in DER with that subject, signed by this key."""
        try:
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        except ValueError:
            raise CommandRefusedError(Sw.WRONG_DATA) from None
        hash_algorithm: hashes.SHA256 | hashes.SHA384 = hashes.SHA256()
        if isinstance(self._key, ec.EllipticCurvePrivateKey) and self._key.key_size > 256:
            hash_algorithm = hashes.SHA384()
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self._key, hash_algorithm)
        return request.public_bytes(serialization.Encoding.DER)

    def _rsa(self, scheme: int) -> tuple[rsa.RSAPrivateKey, padding.AsymmetricPadding]:
        make_padding = _ENCRYPTIONS.get(scheme)
        if make_padding is None or not isinstance(self._key, rsa.RSAPrivateKey):
            raise CommandRefusedError(Sw.NOT_SUPPORTED)
        return self._key, make_padding()


def _pkcs1_v1_5() -> padding.PKCS1v15:
    # Older ones report a wrong padding as an error: an oracle (Bleichenbacher 1998).
    if backend.openssl_version_number() < _FIRST_OPENSSL_WITH_IMPLICIT_REJECTION:
        raise CommandRefusedError(Sw.NOT_SUPPORTED)
    return padding.PKCS1v15()


def _oaep(hash_algorithm: Callable[[], hashes.HashAlgorithm]) -> Callable[[], padding.OAEP]:
    return lambda: padding.OAEP(padding.MGF1(hash_algorithm()), hash_algorithm(), None)


_ENCRYPTIONS: Final[dict[int, Callable[[], padding.AsymmetricPadding]]] = {
    _RSAES_OAEP_SHA256: _oaep(hashes.SHA256),
    _RSAES_OAEP_SHA1: _oaep(hashes.SHA1),
    _RSAES_PKCS1_V1_5: _pkcs1_v1_5,
}
