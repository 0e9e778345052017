"""Operations: bounds, digests without collisions, and results that answer just one operation."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from secfunet.container import ContainerError
from secfunet.gose.v1 import operation_pb2 as pb
from secfunet.operation import (
    OperationError,
    OperationProblem,
    check_key,
    check_result,
    digest_size,
    encryption_scheme,
    encryption_scheme_names,
    operation_name,
    parse_result_set,
    request_digest,
    scheme_name,
    signature_scheme,
    signature_scheme_names,
    validate_operation,
)

ID = bytes(range(16))
VMID, HVID = "V" * 42 + "A", "H" * 42 + "A"
NOW = 1_800_000_000


def sign(
    digest: bytes = b"d" * 32, scheme: Any = pb.SIGNATURE_SCHEME_RSASSA_PSS_SHA256, request_id: bytes = ID
) -> pb.Operation:
    return pb.Operation(request_id=request_id, sign=pb.SignOperation(scheme=scheme, digest=digest))


def decrypt(ciphertext: bytes = b"c" * 256, scheme: Any = pb.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256) -> pb.Operation:
    return pb.Operation(request_id=ID, decrypt=pb.DecryptOperation(scheme=scheme, ciphertext=ciphertext))


def encrypt(plaintext: bytes = b"p", scheme: Any = pb.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256) -> pb.Operation:
    return pb.Operation(request_id=ID, encrypt=pb.EncryptOperation(scheme=scheme, plaintext=plaintext))


def test_names() -> None:
    assert [operation_name(operation) for operation in (sign(), decrypt(), encrypt())] == ["sign", "decrypt", "encrypt"]
    assert scheme_name(sign()) == "rsassa-pss-sha256"
    assert scheme_name(encrypt()) == scheme_name(decrypt()) == "rsaes-oaep-sha256"
    assert len(signature_scheme_names()) == len(pb.SignatureScheme.values()) - 1
    assert len(encryption_scheme_names()) == len(pb.EncryptionScheme.values()) - 1
    for name in signature_scheme_names():
        scheme = signature_scheme(name)
        assert pb.SignatureScheme.Name(scheme) == "SIGNATURE_SCHEME_" + name.upper().replace("-", "_")
        assert scheme_name(sign(scheme=scheme)) == name
        assert validate_operation(sign(b"d" * digest_size(scheme), scheme)) == "sign"
    for name in encryption_scheme_names():
        assert scheme_name(decrypt(scheme=encryption_scheme(name))) == name
    with pytest.raises(OperationError, match="rsassa-pss-sha256"):
        signature_scheme("md5")
    with pytest.raises(OperationError, match="rsaes-oaep-sha256"):
        encryption_scheme("rot13")


@pytest.mark.parametrize(
    ("operation", "problem"),
    [
        (sign(request_id=b""), OperationProblem.REQUEST_ID),
        (sign(request_id=bytes(15)), OperationProblem.REQUEST_ID),
        (sign(request_id=bytes(17)), OperationProblem.REQUEST_ID),
        (pb.Operation(request_id=ID), OperationProblem.KIND),
        (sign(scheme=0), OperationProblem.SCHEME),
        (sign(scheme=9), OperationProblem.SCHEME),
        (decrypt(scheme=0), OperationProblem.SCHEME),
        (encrypt(scheme=4), OperationProblem.SCHEME),
        (sign(b"d" * 31), OperationProblem.DIGEST_SIZE),
        (sign(b"d" * 32, pb.SIGNATURE_SCHEME_ECDSA_SHA384), OperationProblem.DIGEST_SIZE),
        (decrypt(b""), OperationProblem.PAYLOAD_SIZE),
        (decrypt(b"c" * 513), OperationProblem.PAYLOAD_SIZE),
        (encrypt(b"p" * 513), OperationProblem.PAYLOAD_SIZE),
    ],
)
def test_invalid_operations(operation: pb.Operation, problem: OperationProblem) -> None:
    with pytest.raises(OperationError) as caught:
        validate_operation(operation)
    assert caught.value.reason is problem


def test_schemes_fit_keys() -> None:
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    ec_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    ecdsa = sign(scheme=pb.SIGNATURE_SCHEME_ECDSA_SHA256)
    for operation, key in ((sign(), rsa_key), (ecdsa, ec_key), (decrypt(), rsa_key), (encrypt(b"p" * 190), rsa_key)):
        check_key(operation, key)
    for operation, key, problem in (
        (sign(), ec_key, OperationProblem.KEY),
        (ecdsa, rsa_key, OperationProblem.KEY),
        (decrypt(), ec_key, OperationProblem.KEY),
        (decrypt(b"c" * 255), rsa_key, OperationProblem.PAYLOAD_SIZE),
        (encrypt(b"p" * 191), rsa_key, OperationProblem.PAYLOAD_SIZE),
    ):
        with pytest.raises(OperationError) as caught:
            check_key(operation, key)
        assert caught.value.reason is problem


def test_request_digest_is_the_documented_one() -> None:
    assert request_digest(sign()) == hashlib.sha256(b"\x01\x04" + b"d" * 32).digest()
    assert request_digest(decrypt()) == hashlib.sha256(b"\x02\x01" + b"c" * 256).digest()
    assert request_digest(encrypt()) == hashlib.sha256(b"\x03\x01p").digest()


OPERATIONS = st.one_of(
    st.builds(sign, st.binary(max_size=8), st.integers(1, 8), st.binary(min_size=16, max_size=16)),
    st.builds(decrypt, st.binary(max_size=8), st.integers(1, 3)),
    st.builds(encrypt, st.binary(max_size=8), st.integers(1, 3)),
)


@given(OPERATIONS, OPERATIONS)
def test_digests_differ_unless_the_same_is_asked(one: pb.Operation, other: pb.Operation) -> None:
    same = one.WhichOneof("kind") == other.WhichOneof("kind") and (
        one.sign == other.sign and one.decrypt == other.decrypt and one.encrypt == other.encrypt
    )
    assert (request_digest(one) == request_digest(other)) is same


@given(st.binary(max_size=400))
def test_any_operation_is_valid_or_refused(raw: bytes) -> None:
    operation = pb.Operation()
    try:
        operation.ParseFromString(raw)
    except DecodeError:
        return
    for function in (validate_operation, request_digest, scheme_name):
        with contextlib.suppress(OperationError):
            function(operation)  # type: ignore[operator]  # three functions of one argument


def result_set(**changes: Any) -> pb.ResultSet:
    fields: dict[str, Any] = {
        "vmid": VMID,
        "hvid": HVID,
        "time": NOW,
        "results": [
            pb.Result(request_id=b"o" * 16, request_digest=bytes(32), output=b"another's"),
            pb.Result(request_id=ID, request_digest=request_digest(sign()), output=b"signature"),
        ],
        **changes,
    }
    return pb.ResultSet(**fields)


def check(results: pb.ResultSet, operation: pb.Operation | None = None, now: float = NOW) -> bytes:
    return check_result(results, operation=operation or sign(), vmid=VMID, hvid=HVID, now=now)


def test_the_right_result_is_taken() -> None:
    assert check(result_set()) == b"signature"
    assert check(result_set(), now=NOW + 60) == b"signature"
    assert check(result_set(), now=NOW - 60) == b"signature"


@pytest.mark.parametrize(
    "results",
    [
        result_set(vmid=HVID),
        result_set(vmid=""),
        result_set(hvid=VMID),
        result_set(time=0),
        result_set(time=NOW - 61),
        result_set(time=NOW + 61),
        result_set(time=-(2**63)),
        result_set(results=[]),
        result_set(results=[pb.Result(request_id=b"o" * 16, request_digest=request_digest(sign()), output=b"x")]),
        result_set(results=[pb.Result(request_id=ID, request_digest=request_digest(encrypt()), output=b"x")]),
        result_set(results=[pb.Result(request_id=ID, request_digest=request_digest(sign()), output=b"x")] * 2),
        result_set(results=[pb.Result(request_id=ID, output=b"x")]),
    ],
    ids=[
        "vm",
        "no-vm",
        "hypervisor",
        "epoch",
        "old",
        "future",
        "far",
        "empty",
        "request",
        "operation",
        "twice",
        "no-digest",
    ],
)
def test_the_answer_to_something_else_is_refused(results: pb.ResultSet) -> None:
    with pytest.raises(ContainerError) as caught:
        check(results)
    assert str(caught.value) == "the container is refused"


def test_the_result_of_another_scheme_is_refused() -> None:
    with pytest.raises(ContainerError):
        check(result_set(), sign(scheme=pb.SIGNATURE_SCHEME_RSASSA_PKCS1_V1_5_SHA256))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_result_set_or_refused(untrusted: bytes) -> None:
    try:
        results = parse_result_set(untrusted)
    except ContainerError:
        return
    with pytest.raises(ContainerError):
        check(results)


def test_result_sets_are_bounded() -> None:
    many = pb.ResultSet(results=[pb.Result()] * 65).SerializeToString()
    with pytest.raises(ContainerError):
        parse_result_set(many)
    with pytest.raises(ContainerError):
        parse_result_set(pb.ResultSet(vmid="v" * 70000).SerializeToString())
    assert parse_result_set(result_set().SerializeToString()) == result_set()
