"""What is asked of a VM's key, checked, named and condensed; and whether a result answers just that.

A request digest binds a result to its operation. It is the SHA-256 of

    kind (1 byte: 01 sign, 02 decrypt, 03 encrypt) ‖ scheme (1 byte: the number in its enum) ‖ payload (digest, ciphertext or
    plaintext)

and not of a protobuf serialisation, which is not canonical. Kind and scheme have a fixed size and there is one payload, which
goes to the end: two different operations never have the same encoding. The request id is not part of it; a result repeats it
beside the digest.
"""

from __future__ import annotations

import hashlib
import hmac
from enum import Enum
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from google.protobuf.message import DecodeError

from secfunet.container import ContainerError
from secfunet.errors import SecFuNetError
from secfunet.gose.v1 import operation_pb2

REQUEST_ID_SIZE: Final = 16
MAX_PAYLOAD: Final = 512
"""Bytes of the longest ciphertext or plaintext: the modulus of RSA-4096."""
MAX_RESULTS: Final = 64
"""Results in one container."""
MAX_RESULT_SET_SIZE: Final = 65536
"""Bytes of the longest plaintext of a container."""
MAX_AGE: Final = 60.0
"""Seconds that a result is believed after it was made."""
MAX_SKEW: Final = 60.0
"""Seconds by which the grid's clock may be ahead of the reader's."""

OPERATIONS: Final = ("sign", "decrypt", "encrypt")
"""The names of the kinds, as in a VM-Auth-Token's ``ops``."""


class OperationProblem(Enum):
    """What is wrong with an operation."""

    REQUEST_ID = "the request id is not 16 bytes"
    KIND = "nothing is asked"
    SCHEME = "the scheme is unknown"
    DIGEST_SIZE = "the digest is not as long as the scheme's hash"
    PAYLOAD_SIZE = "the ciphertext or plaintext is empty or too long"
    KEY = "the scheme does not fit the key"


class OperationError(SecFuNetError):
    """An operation that no card is asked for; ``reason`` says why."""

    def __init__(self, reason: OperationProblem, message: str | None = None) -> None:
        super().__init__(message or reason.value)
        self.reason = reason


class _Signature(NamedTuple):
    name: str
    digest_size: int
    is_rsa: bool


_SIGNATURES: Final = {
    operation_pb2.SIGNATURE_SCHEME_RSASSA_PKCS1_V1_5_SHA256: _Signature("rsassa-pkcs1-v1_5-sha256", 32, True),
    operation_pb2.SIGNATURE_SCHEME_RSASSA_PKCS1_V1_5_SHA384: _Signature("rsassa-pkcs1-v1_5-sha384", 48, True),
    operation_pb2.SIGNATURE_SCHEME_RSASSA_PKCS1_V1_5_SHA512: _Signature("rsassa-pkcs1-v1_5-sha512", 64, True),
    operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256: _Signature("rsassa-pss-sha256", 32, True),
    operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA384: _Signature("rsassa-pss-sha384", 48, True),
    operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA512: _Signature("rsassa-pss-sha512", 64, True),
    operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256: _Signature("ecdsa-sha256", 32, False),
    operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA384: _Signature("ecdsa-sha384", 48, False),
}


class _Encryption(NamedTuple):
    name: str
    overhead: int  # bytes of the modulus that are not the plaintext's (RFC 8017, 7.1.1 and 7.2.1)


_ENCRYPTIONS: Final = {
    operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256: _Encryption("rsaes-oaep-sha256", 2 * 32 + 2),
    operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA1: _Encryption("rsaes-oaep-sha1", 2 * 20 + 2),
    operation_pb2.ENCRYPTION_SCHEME_RSAES_PKCS1_V1_5: _Encryption("rsaes-pkcs1-v1_5", 11),
}

_SIGNATURE_BY_NAME: Final = {entry.name: scheme for scheme, entry in _SIGNATURES.items()}
_ENCRYPTION_BY_NAME: Final = {entry.name: scheme for scheme, entry in _ENCRYPTIONS.items()}
_KIND: Final = {"sign": b"\1", "decrypt": b"\2", "encrypt": b"\3"}


def signature_scheme_names() -> tuple[str, ...]:
    """The names of all signature schemes, in the order of their numbers."""
    return tuple(_SIGNATURE_BY_NAME)


def encryption_scheme_names() -> tuple[str, ...]:
    """The names of all encryption schemes, in the order of their numbers."""
    return tuple(_ENCRYPTION_BY_NAME)


def signature_scheme(name: str) -> operation_pb2.SignatureScheme:
    """The scheme of that name, such as ``rsassa-pss-sha256``. Raises OperationError."""
    if name not in _SIGNATURE_BY_NAME:
        raise OperationError(OperationProblem.SCHEME, f"a signature scheme is one of {', '.join(_SIGNATURE_BY_NAME)}")
    return _SIGNATURE_BY_NAME[name]


def encryption_scheme(name: str) -> operation_pb2.EncryptionScheme:
    """The scheme of that name, such as ``rsaes-oaep-sha256``. Raises OperationError."""
    if name not in _ENCRYPTION_BY_NAME:
        raise OperationError(
            OperationProblem.SCHEME, f"an encryption scheme is one of {', '.join(_ENCRYPTION_BY_NAME)}"
        )
    return _ENCRYPTION_BY_NAME[name]


def digest_size(scheme: operation_pb2.SignatureScheme) -> int:
    """Bytes of the digest that a signature scheme signs: 32, 48 or 64. Raises OperationError."""
    if scheme not in _SIGNATURES:
        raise OperationError(OperationProblem.SCHEME)
    return _SIGNATURES[scheme].digest_size


def operation_name(operation: operation_pb2.Operation) -> str:
    """``sign``, ``decrypt`` or ``encrypt``. Raises OperationError."""
    kind: str | None = operation.WhichOneof("kind")
    if kind is None:
        raise OperationError(OperationProblem.KIND)
    return kind


def scheme_name(operation: operation_pb2.Operation) -> str:
    """The lower-case name of the operation's scheme. Raises OperationError."""
    kind = operation_name(operation)
    if kind == "sign":
        signature = _SIGNATURES.get(operation.sign.scheme)
        if signature is not None:
            return signature.name
    else:
        encryption = _ENCRYPTIONS.get(_encryption(operation, kind)[0])
        if encryption is not None:
            return encryption.name
    raise OperationError(OperationProblem.SCHEME)


def validate_operation(untrusted: operation_pb2.Operation) -> str:
    """Checks everything that can be checked without the key; returns the operation's name. Raises OperationError.

    The rules, in their order: the request id has 16 bytes; one kind is asked; its scheme is known; a digest is as long as the
    scheme's hash; a ciphertext or a plaintext has 1 to 512 bytes.
    """
    if len(untrusted.request_id) != REQUEST_ID_SIZE:
        raise OperationError(OperationProblem.REQUEST_ID)
    name = operation_name(untrusted)
    if name == "sign":
        if len(untrusted.sign.digest) != digest_size(untrusted.sign.scheme):
            raise OperationError(OperationProblem.DIGEST_SIZE)
        return name
    scheme, payload = _encryption(untrusted, name)
    if scheme not in _ENCRYPTIONS:
        raise OperationError(OperationProblem.SCHEME)
    if not 1 <= len(payload) <= MAX_PAYLOAD:
        raise OperationError(OperationProblem.PAYLOAD_SIZE)
    return name


def check_key(operation: operation_pb2.Operation, key: PublicKeyTypes) -> None:
    """Checks a valid operation against the public key of the VM that is to do it. Raises OperationError.

    RSA schemes need an RSA key, ECDSA an elliptic-curve key; a ciphertext is as long as the modulus, a plaintext leaves room
    for the padding.
    """
    name = validate_operation(operation)
    if name == "sign":
        if not isinstance(
            key, rsa.RSAPublicKey if _SIGNATURES[operation.sign.scheme].is_rsa else ec.EllipticCurvePublicKey
        ):
            raise OperationError(OperationProblem.KEY)
        return
    if not isinstance(key, rsa.RSAPublicKey):
        raise OperationError(OperationProblem.KEY)
    scheme, payload = _encryption(operation, name)
    modulus = (key.key_size + 7) // 8
    if name == "decrypt" and len(payload) != modulus:
        raise OperationError(OperationProblem.PAYLOAD_SIZE, f"a ciphertext for this key has {modulus} bytes")
    longest = modulus - _ENCRYPTIONS[scheme].overhead
    if name == "encrypt" and len(payload) > longest:
        raise OperationError(
            OperationProblem.PAYLOAD_SIZE, f"a plaintext for this key and scheme has at most {longest} bytes"
        )


def request_digest(operation: operation_pb2.Operation) -> bytes:
    """SHA-256 over the encoding of this module's docstring, 32 bytes. Raises OperationError if kind or scheme are unknown."""
    name = operation_name(operation)
    if name == "sign":
        scheme: int = operation.sign.scheme
        payload = operation.sign.digest
        is_known = operation.sign.scheme in _SIGNATURES
    else:
        encryption, payload = _encryption(operation, name)
        scheme = encryption
        is_known = encryption in _ENCRYPTIONS
    if not is_known:
        raise OperationError(OperationProblem.SCHEME)
    return hashlib.sha256(_KIND[name] + scheme.to_bytes(1) + payload).digest()


def parse_result_set(untrusted: bytes) -> operation_pb2.ResultSet:
    """The plaintext of a container: at most 65,536 bytes and 64 results. Raises ContainerError."""
    if len(untrusted) > MAX_RESULT_SET_SIZE:
        raise ContainerError
    try:
        result_set = operation_pb2.ResultSet.FromString(untrusted)
    except DecodeError:
        raise ContainerError from None
    if len(result_set.results) > MAX_RESULTS:
        raise ContainerError
    return result_set


def check_result(
    result_set: operation_pb2.ResultSet,
    *,
    operation: operation_pb2.Operation,
    vmid: str,
    hvid: str,
    now: float,
    max_age: float = MAX_AGE,
    max_skew: float = MAX_SKEW,
) -> bytes:
    """The output of ``operation``, out of a container that was verified and opened. Raises ContainerError, and never says which
    rule failed.

    The rules, in their order: the set is of this VM; it was made for this hypervisor; its time is at most ``max_age`` seconds
    before ``now`` (UTC seconds) and at most ``max_skew`` after it; exactly one of its results has the operation's request id;
    that one has the operation's digest.
    """
    digest = request_digest(operation)
    if not hmac.compare_digest(result_set.vmid.encode(), vmid.encode()):
        raise ContainerError
    if not hmac.compare_digest(result_set.hvid.encode(), hvid.encode()):
        raise ContainerError
    if not now - max_age <= result_set.time <= now + max_skew:
        raise ContainerError
    answers = [result for result in result_set.results if hmac.compare_digest(result.request_id, operation.request_id)]
    if len(answers) != 1:
        raise ContainerError
    if not hmac.compare_digest(answers[0].request_digest, digest):
        raise ContainerError
    return answers[0].output


def _encryption(operation: operation_pb2.Operation, name: str) -> tuple[operation_pb2.EncryptionScheme, bytes]:
    if name == "decrypt":
        return operation.decrypt.scheme, operation.decrypt.ciphertext
    return operation.encrypt.scheme, operation.encrypt.plaintext
