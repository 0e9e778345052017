"""Enrolment, with real cards: what is loaded is what was issued; a dead run is healed by the next one; nothing is destroyed unasked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from gose.authority import enrolment
from gose.authority.certificate_authority import CertificateAuthority, new_authority_key
from gose.authority.enrolment import CardAccess, EnrolmentOrder, enrol
from gose.authority.errors import CardInUseError, EnrolmentError, IssuanceError
from gose.registry import AlreadyEnrolledError, Identity, Registry
from secfunet.card import CardClient, KeyAlgorithm, connect_unix
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import Holder, Role, load_certificate, verify_certificate
from tests.support.cards import CardProcess, running_card

CA = CertificateAuthority.create("A grid", new_authority_key("p-384"), now=time.time())
VM = EnrolmentOrder(Holder(Role.VM, "web"), "vm", KeyAlgorithm.RSA_2048, 3600, seid="se-1")
QUICK = dataclasses.replace(VM, algorithm=KeyAlgorithm.P_256)


@pytest.fixture
async def card(tmp_path: Path) -> AsyncIterator[CardProcess]:
    async with running_card(tmp_path) as running:
        yield running


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "grid.sqlite")


def access(card: CardProcess, client: type[CardClient] = CardClient) -> CardAccess:
    async def connect() -> CardClient:
        return client(await connect_unix(card.socket, timeout=10))

    return CardAccess(connect, card.keys)


async def run(order: EnrolmentOrder, how: CardAccess, registry: Registry) -> Identity:
    return await enrol(order, how, CA, registry, clock=time.time)


async def certificate_on(card: CardProcess, label: str) -> bytes:
    client = await card.connect(label)
    try:
        return await client.certificate()
    finally:
        await client.close()


class Died(BaseException):
    """The process that enrols is gone, there and then."""


class DiesBeforeRequest(CardClient):
    async def certificate_signing_request(self, name: str, subject_cn: str) -> bytes:
        raise Died


class DiesBeforeLoad(CardClient):
    async def load_identity(self, name: str, eap_id: bytes, certificate: bytes, authorities: Sequence[bytes]) -> None:
        raise Died


class DiesAfterLoad(CardClient):
    async def load_identity(self, name: str, eap_id: bytes, certificate: bytes, authorities: Sequence[bytes]) -> None:
        await super().load_identity(name, eap_id, certificate, authorities)
        raise Died


async def test_the_card_then_signs_with_the_certified_key(card: CardProcess, registry: Registry) -> None:
    identity = await run(VM, access(card), registry)
    assert (identity.role, identity.name, identity.seid) == (Role.VM, "web", "se-1")
    assert await certificate_on(card, "vm") == identity.certificate
    certificate = load_certificate(identity.certificate)
    assert verify_certificate(certificate, CA.certificate, role=Role.VM, now=time.time()) == VM.holder
    client = await card.connect("vm")
    digest = hashes.Hash(hashes.SHA256())
    digest.update(b"message")
    try:
        scheme = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
        signature = await client.sign(scheme, digest.finalize())
    finally:
        await client.close()
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    key.verify(signature, b"message", padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())


@pytest.mark.parametrize("dying", [DiesBeforeRequest, DiesBeforeLoad, DiesAfterLoad])
@pytest.mark.parametrize("with_card", [False, True], ids=["card lives", "card is killed too"])
async def test_a_second_run_heals_what_a_dead_one_left(
    card: CardProcess, registry: Registry, dying: type[CardClient], with_card: bool
) -> None:
    with pytest.raises(Died):
        await run(QUICK, access(card, dying), registry)
    assert registry.identities(Role.VM) == ()
    if with_card:
        await card.kill()
        await card.start()
    left = registry.pending(Role.VM, "web")
    identity = await run(QUICK, access(card), registry)
    assert registry.named(Role.VM, "web") == identity
    assert registry.pending(Role.VM, "web") is None
    assert await certificate_on(card, "vm") == identity.certificate
    assert (left is not None and left.thumbprint == identity.thumbprint) is (dying is DiesAfterLoad)


async def test_a_dead_replacement_is_healed_too(card: CardProcess, registry: Registry) -> None:
    await run(QUICK, access(card), registry)
    again = dataclasses.replace(QUICK, replace=True)
    with pytest.raises(Died):
        await run(again, access(card, DiesBeforeLoad), registry)
    identity = await run(QUICK, access(card), registry)
    assert await certificate_on(card, "vm") == identity.certificate == registry.named(Role.VM, "web").certificate


async def test_nothing_is_destroyed_unasked(card: CardProcess, registry: Registry) -> None:
    first = await run(QUICK, access(card), registry)
    with pytest.raises(AlreadyEnrolledError, match="--replace"):
        await run(QUICK, access(card), registry)
    other = dataclasses.replace(QUICK, holder=Holder(Role.VM, "mail"))
    with pytest.raises(AlreadyEnrolledError) as caught:
        await run(other, access(card), registry)
    assert caught.value.by == "web"
    with pytest.raises(EnrolmentError, match="did not make"):  # the registry knows nothing of it, the card does
        await run(dataclasses.replace(other, seid="se-2"), access(card), registry)
    assert await certificate_on(card, "vm") == first.certificate
    second = await run(dataclasses.replace(QUICK, replace=True), access(card), registry)
    assert second.thumbprint != first.thumbprint
    assert await certificate_on(card, "vm") == second.certificate
    assert registry.find_vm(first.thumbprint) is None


async def test_a_card_with_several_identities(card: CardProcess, registry: Registry) -> None:
    first = await run(QUICK, access(card), registry)
    other = dataclasses.replace(
        QUICK, holder=Holder(Role.SERVER, "s"), label="other", seid=None, server_names=("localhost",)
    )
    second = await run(other, access(card), registry)
    assert await certificate_on(card, "other") == second.certificate
    assert await certificate_on(card, "vm") == first.certificate


async def test_a_hypervisor_has_an_rsa_key(card: CardProcess, registry: Registry) -> None:
    order = EnrolmentOrder(Holder(Role.HYPERVISOR, "host"), "hypervisor", KeyAlgorithm.P_256, 3600)
    with pytest.raises(IssuanceError, match="RSA"):
        await run(order, access(card), registry)
    identity = await run(dataclasses.replace(order, algorithm=KeyAlgorithm.RSA_2048), access(card), registry)
    assert identity.seid is None


async def test_nobody_but_its_administrator_personalises_a_card(card: CardProcess, registry: Registry) -> None:
    same_version = dataclasses.replace(access(card), keys=AdministratorKeys.generate(card.keys.version))
    with pytest.raises(EnrolmentError, match="not the administrator's keys"):
        await run(QUICK, same_version, registry)
    with pytest.raises(EnrolmentError, match="of version 9"):
        await run(QUICK, dataclasses.replace(access(card), keys=AdministratorKeys.generate(9)), registry)
    assert registry.pending(Role.VM, "web") is None
    await run(QUICK, access(card), registry)  # nothing was blocked by that


class OfSomebodyElse(CardClient):
    """A card whose request carries a key that it does not hold: the signature cannot be right."""

    async def certificate_signing_request(self, name: str, subject_cn: str) -> bytes:
        request = await super().certificate_signing_request(name, subject_cn)
        return request[:-1] + bytes((request[-1] ^ 1,))


class KeepsAnother(CardClient):
    """A card that says thank you and keeps another certificate."""

    async def certificate(self, name: str = "") -> bytes:
        return (await super().certificate(name))[:-1] + b"\0"


async def test_cards_that_cheat(card: CardProcess, registry: Registry) -> None:
    with pytest.raises(IssuanceError, match="signed by its own key"):
        await run(QUICK, access(card, OfSomebodyElse), registry)
    assert registry.pending(Role.VM, "web") is None
    with pytest.raises(EnrolmentError, match="not to be trusted"):
        await run(QUICK, access(card, KeepsAnother), registry)
    assert registry.identities(Role.VM) == ()


async def test_a_card_in_use_is_not_personalised(
    card: CardProcess, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gose.authority.enrolment.CONNECT_TIMEOUT", 0.5)
    held = await card.connect()
    try:
        with pytest.raises(EnrolmentError, match="secure-middleware serve"):
            await run(QUICK, CardAccess.at(card.socket, card.keys), registry)
    finally:
        await held.close()
    await run(QUICK, CardAccess.at(card.socket, card.keys), registry)


def test_keys_are_not_in_a_repr() -> None:
    keys = AdministratorKeys.generate()
    shown = repr(CardAccess.at(Path("x"), keys)) + repr(keys)
    assert repr(keys.keys.enc) not in shown
    assert keys.keys.enc.hex() not in shown


async def test_the_advice_about_a_busy_card_fits_its_role(
    card: CardProcess, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hypervisor's card is the middleware's, and revoking cannot be undone: it is not proposed for a card that is merely busy."""
    monkeypatch.setattr(enrolment, "BUSY_PATIENCE", 0.2)
    hypervisor = EnrolmentOrder(Holder(Role.HYPERVISOR, "xen-1"), "hypervisor", KeyAlgorithm.RSA_2048, 3600)
    other = await connect_unix(card.socket, timeout=10)
    try:
        with pytest.raises(CardInUseError, match="stop 'secure-middleware serve' meanwhile") as caught:
            await run(hypervisor, CardAccess.at(card.place, card.keys), registry)
        assert "revoke" not in str(caught.value)
        assert "gose serve" not in str(caught.value)
    finally:
        await other.close()
