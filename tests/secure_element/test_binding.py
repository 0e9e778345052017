"""A bound identity in the card: whose results it seals, for whom, and what it does no longer."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from secfunet.apdu import StatusError
from secfunet.card import KeyAlgorithm
from secfunet.card.binding import Binding, SealedAnswer, SealedOperation, SealRequest
from secfunet.card.errors import CardFormatError
from secfunet.card.instructions import KeyOperation
from secfunet.container import ContainerProfile, unwrap_content_key, verify_container
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate, rsa_key_of, thumbprint
from secfunet.operation import check_result, parse_result_set
from secure_element.card_os import CardOs
from tests.support.local_card import administrator_client, new_store, open_store, personalised, ready_client
from tests.support.pki import CertificateAuthority

NOW = 1_800_000_000
OAEP, PSS = 1, 4
RECIPIENT = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)


def certificate_of(key: rsa.RSAPrivateKey, authority: CertificateAuthority) -> bytes:
    return authority.issue(key.public_key(), "xen").public_bytes(Encoding.DER)


def signature(payload: bytes = bytes(32), request_id: bytes = b"s" * 16) -> SealedOperation:
    return SealedOperation(KeyOperation.SIGN, PSS, request_id, payload)


class Bound:
    """A card with an RSA and an EC identity; the first one is bound to RECIPIENT."""

    def __init__(self, card: CardOs, authority: CertificateAuthority) -> None:
        self.card = card
        self.hypervisor = certificate_of(RECIPIENT, authority)
        self.other = certificate_of(OTHER, authority)

    async def bind(self, name: str, hypervisor: bytes, profile: int = 1) -> None:
        administrator = await administrator_client(self.card)
        await administrator.bind_identity(name, profile, hypervisor)


@pytest.fixture
async def bound(tmp_path: Path) -> Bound:
    authority = CertificateAuthority()
    names = (("vm", KeyAlgorithm.RSA_2048), ("ec", KeyAlgorithm.P_256))
    made = Bound(await personalised(new_store(tmp_path), authority, *names), authority)
    await made.bind("vm", made.hypervisor)
    return made


async def refused(sw: int, awaitable: object) -> None:
    with pytest.raises(StatusError) as refusal:
        await awaitable  # type: ignore[misc]  # a coroutine of any kind
    assert refusal.value.sw == sw


@pytest.mark.parametrize("profile", list(ContainerProfile))
async def test_results_are_sealed_for_one_and_signed_by_the_vm(bound: Bound, profile: ContainerProfile) -> None:
    await bound.bind("vm", bound.hypervisor, profile)
    user = await ready_client(bound.card, "vm")
    vm = load_certificate(await user.certificate())
    vmid, hvid = thumbprint(await user.certificate()), thumbprint(bound.hypervisor)
    assert await user.binding() == Binding(profile, hvid)
    secret = os.urandom(20)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    ciphertext = rsa_key_of(vm).encrypt(secret, oaep)
    decrypt = SealedOperation(KeyOperation.DECRYPT, OAEP, b"d" * 16, ciphertext)
    broken = SealedOperation(KeyOperation.DECRYPT, OAEP, b"b" * 16, bytes(256))
    answer = await user.seal(SealRequest(NOW, (signature(), decrypt, broken)))
    assert answer.failures == ((b"b" * 16, 0x6A80),)
    assert secret not in answer.container
    verified = verify_container(answer.container, rsa_key_of(vm), 256, profile)
    results = parse_result_set(verified.open(unwrap_content_key(RECIPIENT, verified.header, profile)))
    asked = operation_pb2.Operation(
        request_id=b"d" * 16, decrypt=operation_pb2.DecryptOperation(scheme=OAEP, ciphertext=ciphertext)
    )
    assert check_result(results, operation=asked, vmid=vmid, hvid=hvid, now=NOW) == secret
    assert len(results.results) == 2
    # One content key serves several containers; after a reset it is another one.
    again = await user.seal(SealRequest(NOW, (signature(),)))
    assert again.container[:256] == answer.container[:256]
    bound.card.reset()
    user = await ready_client(bound.card, "vm")
    assert (await user.seal(SealRequest(NOW, (signature(),)))).container[:256] != again.container[:256]


async def test_what_a_bound_identity_does_no_longer(bound: Bound) -> None:
    user = await ready_client(bound.card, "vm")
    await refused(0x6985, user.sign(PSS, bytes(32)))
    await refused(0x6985, user.decrypt(OAEP, bytes(256)))
    await refused(0x6985, user.unwrap_key(1, bytes(256)))
    await refused(0x6985, user.process_eap(bytes.fromhex("010000060D20")))
    await refused(0x6982, user.bind_identity("vm", 1))  # its user does not free it
    await refused(0x6985, user.sign(PSS, bytes(32)))
    await user.set_identity("ec")  # the others are as they were
    assert await user.binding() is None
    assert await user.sign(7, bytes(32))
    assert await user.process_eap(bytes.fromhex("010000060D20"))
    await refused(0x6985, user.seal(SealRequest(NOW, (signature(),))))


async def test_binding_is_durable_and_changed_by_the_administrator_alone(bound: Bound, tmp_path: Path) -> None:
    user = await ready_client(bound.card, "vm")
    await bound.bind("vm", bound.other)
    user = await ready_client(bound.card, "vm")
    container = (await user.seal(SealRequest(NOW, (signature(),)))).container
    with pytest.raises(ValueError, match=r".*"):
        RECIPIENT.decrypt(container[:256], padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
    binding = await user.binding()
    assert binding is not None
    assert binding.hvid == thumbprint(bound.other)
    store = bound.card._channel._store
    store.close()
    card = CardOs(open_store(tmp_path))
    user = await ready_client(card, "vm")
    assert await user.binding() == binding
    administrator = await administrator_client(card)
    await administrator.bind_identity("vm", 1)
    user = await ready_client(card, "vm")
    assert await user.binding() is None
    assert await user.sign(PSS, bytes(32))


async def test_what_cannot_be_bound(bound: Bound) -> None:
    administrator = await administrator_client(bound.card)
    await refused(0x6A81, administrator.bind_identity("ec", 1, bound.hypervisor))
    await refused(0x6A88, administrator.bind_identity("nobody", 1, bound.hypervisor))
    await refused(0x6A80, administrator.bind_identity("vm", 1, b"no certificate"))
    await refused(0x6B00, administrator.bind_identity("vm", 3, bound.hypervisor))
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - weak on purpose
    await refused(0x6A80, administrator.bind_identity("vm", 1, certificate_of(weak, CertificateAuthority())))
    await administrator.generate_key("new", KeyAlgorithm.RSA_2048)
    await refused(0x6985, administrator.bind_identity("new", 1, bound.hypervisor))


async def test_any_request_is_answered(bound: Bound) -> None:
    await ready_client(bound.card, "vm")
    head = bytes.fromhex("01000800000000000000FF")

    @given(
        st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: head + b"\2" + len(rest).to_bytes(2) + rest)
    )
    def ask(data: bytes) -> None:
        response = bound.card.process(
            b"\x80\x2c\0\0\0" + len(data).to_bytes(2) + data + b"\0\0" if data else b"\x80\x2c\0\0"
        )
        assert response[-2:] in (b"\x90\0", b"\x6a\x80")

    ask()


operations = st.builds(
    SealedOperation,
    st.sampled_from((KeyOperation.SIGN, KeyOperation.DECRYPT, KeyOperation.ENCRYPT)),
    st.integers(0, 255),
    st.binary(min_size=16, max_size=16),
    st.binary(max_size=64),
)


@given(st.lists(operations, min_size=1, max_size=8, unique_by=lambda one: one.request_id), st.integers(0, 2**40))
def test_requests_round_trip(many: list[SealedOperation], time: int) -> None:
    request = SealRequest(time, tuple(many))
    assert SealRequest.decode(request.encode()) == request
    for one in many:
        digest = hashlib.sha256(bytes((one.kind, one.scheme)) + one.payload).digest()
        assert len(digest) == 32


@given(st.binary(max_size=50), st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF))))
def test_answers_round_trip(container: bytes, failures: list[tuple[bytes, int]]) -> None:
    answer = SealedAnswer(container, tuple(failures))
    assert SealedAnswer.decode(answer.encode()) == answer


@given(st.binary(max_size=100))
def test_any_bytes(untrusted: bytes) -> None:
    for decode in (SealRequest.decode, SealedAnswer.decode, Binding.decode):
        with contextlib.suppress(CardFormatError):
            decode(untrusted)
