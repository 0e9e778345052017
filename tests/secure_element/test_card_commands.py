"""What each command does and refuses, over a real store; EAP between two cards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.apdu import PinError, StatusError
from secfunet.card import CardClient, EapState, KeyAlgorithm, Segmentation, TlsParameters
from secfunet.card.administrator import open_secure_channel
from secfunet.card.profile import CardProfile
from secure_element.applet import CardOptions, SessionKeyOrder
from secure_element.card_os import CardOs
from secure_element.identities import MAX_IDENTITIES
from secure_element.segmentation import AnswerStyle
from tests.support.local_card import (
    KEYS,
    USER_PIN,
    LocalPort,
    administrator_client,
    new_store,
    open_store,
    personalised,
    ready_client,
)
from tests.support.pki import CertificateAuthority


async def test_the_pin_is_changed_and_unblocked(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    client = await ready_client(CardOs(store))
    await client.change_pin(USER_PIN, b"12345678")
    with pytest.raises(PinError) as wrong:
        await client.verify_pin(USER_PIN)
    assert wrong.value.attempts_remaining == 2
    with pytest.raises(PinError):  # a wrong PIN closes what the right one had opened
        await client.state()
    for left in (1, 0, 0):
        with pytest.raises(PinError) as wrong:
            await client.change_pin(USER_PIN, b"1111")
        assert wrong.value.attempts_remaining == left
    assert await client.pin_attempts() == 0
    await refused(0x6982, client.unblock_pin(b"4711"))  # not without the administrator
    await (await open_secure_channel(client, KEYS)).unblock_pin(b"4711")
    store.close()
    client = CardClient(LocalPort(CardOs(open_store(tmp_path))))
    await client.select()
    await client.verify_pin(b"4711")
    assert await client.pin_attempts() == 3


async def test_a_pin_that_nobody_can_type_is_refused(tmp_path: Path) -> None:
    card = CardOs(new_store(tmp_path))
    card.process(bytes.fromhex("00A404000711223344556601"))
    old = USER_PIN.ljust(8, b"\xff")
    for new in (b"\xff" * 8, b"123".ljust(8, b"\xff"), b"12\xff45678"):
        assert card.process(b"\xa0\x24\0\0\x10" + old + new) == b"\x6a\x80"
    assert card.process(b"\xa0\x20\0\0") == b"\x63\x03"
    assert card.process(b"\xa0\x20\0\1") == b"\x6b\0"  # there is no operator's


async def refused(sw: int, awaitable: object) -> None:
    with pytest.raises(StatusError) as refusal:
        await awaitable  # type: ignore[misc]  # a coroutine of any kind
    assert refusal.value.sw == sw


async def test_personalisation_refuses_what_does_not_fit(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    store = new_store(tmp_path)
    card = CardOs(store)
    client = await administrator_client(card)
    assert await client.identities() == ()
    await refused(0x6A88, client.current_identity())
    await refused(0x6A88, client.certificate_signing_request("a", "a"))
    for name in ("", "x" * 33, "with space", "ümlaut"):
        await refused(0x6A80, client.generate_key(name, KeyAlgorithm.P_256))
    for name in ("a", "b"):
        await client.generate_key(name, KeyAlgorithm.P_256)
    for_a = authority.issue_for_request(await client.certificate_signing_request("a", "subject"))
    for_b = authority.issue_for_request(await client.certificate_signing_request("b", "subject"))
    await refused(0x6A80, client.load_identity("a", b"id", for_b, (authority.der,)))
    await refused(0x6A80, client.load_identity("a", b"id", b"no certificate", (authority.der,)))
    await refused(0x6A80, client.load_identity("a", b"id", for_a, ()))
    await refused(0x6A80, client.load_identity("a", b"id", for_a, (b"no certificate",)))
    await refused(0x6A80, client.load_identity("a", bytes(254), for_a, (authority.der,)))
    await refused(0x6A88, client.load_identity("c", b"id", for_a, (authority.der,)))
    before = store.contents.identities[0].private_key
    await client.generate_key("a", KeyAlgorithm.P_256)  # nobody has certified the first key: it may be replaced
    assert before not in [record.private_key for record in store.contents.identities]
    for_a = authority.issue_for_request(await client.certificate_signing_request("a", "subject"))
    await client.load_identity("a", b"id", for_a, (authority.der,))
    await refused(0x6A89, client.generate_key("a", KeyAlgorithm.P_256))  # now it is precious
    renewed = authority.issue_for_request(await client.certificate_signing_request("a", "subject"))
    await client.load_identity("a", b"id2", renewed, (authority.der,))
    assert await client.identities() == ("b", "a")
    await client.verify_pin(USER_PIN)
    await refused(0x6985, client.set_identity("b"))  # no certificate yet
    await client.set_identity("a")
    assert await client.certificate() == renewed
    assert CardProfile.decode(await client.profile()) == CardProfile(b"id2", (renewed,), (authority.der,))
    await client.delete_identity("a")
    await refused(0x6985, client.sign(7, bytes(32)))
    await refused(0x6A88, client.delete_identity("a"))
    for number in range(MAX_IDENTITIES - 1):
        await client.generate_key(f"n{number}", KeyAlgorithm.P_256)
    await refused(0x6A84, client.generate_key("one-too-many", KeyAlgorithm.P_256))


async def test_what_the_user_may_not_do(tmp_path: Path) -> None:
    card = await personalised(new_store(tmp_path), CertificateAuthority(), ("vm", KeyAlgorithm.P_256))
    user = await ready_client(card)
    for attempt in (
        user.generate_key("x", KeyAlgorithm.P_256),
        user.certificate_signing_request("vm", "x"),
        user.load_identity("vm", b"", b"", ()),
        user.delete_identity("vm"),
    ):
        await refused(0x6982, attempt)
    administrator = await administrator_client(card)
    await refused(0x6303, administrator.sign(7, bytes(32)))
    await refused(0x6303, administrator.set_identity("vm"))


async def full_eap(client: CardClient, server: CardClient) -> None:
    """EAP-TLS between two cards, as a peer and an authentication server have it."""
    await server.set_tls_parameters(TlsParameters(role="server"))
    packet = bytes.fromhex("0101000501")
    for _ in range(100):
        packet = await client.process_eap(packet)
        if not packet:
            return
        packet = await server.process_eap(packet)
    pytest.fail("EAP does not end")


@pytest.mark.parametrize("style", list(AnswerStyle))
@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_keys_and_parameters_that_eap_yields(
    tmp_path: Path, style: AnswerStyle, segmentation: Segmentation
) -> None:
    authority = CertificateAuthority()
    clients: list[CardClient] = []
    for name, order in (("peer", SessionKeyOrder.TRACE), ("server", SessionKeyOrder.RFC)):
        (tmp_path / name).mkdir()
        options = CardOptions(answers=style, session_key_order=order)
        identity = (name, KeyAlgorithm.P_256)
        card = await personalised(new_store(tmp_path / name), authority, identity, options=options)
        clients.append(await ready_client(card, name, segmentation=segmentation))
    peer, server = clients
    await refused(0x6985, peer.session_key())
    assert await peer.state() is EapState.NOT_AUTHENTICATED
    await full_eap(peer, server)
    for client in clients:
        assert await client.state() is EapState.AUTHENTICATED
        assert await client.version() == (1, 0)
        assert await client.version(method=True) == (1, 0)
    swapped, plain = await peer.session_key(), await server.session_key()
    assert len(plain) == 64
    assert swapped == plain[32:] + plain[:32]
    both = await server.session_key(extended=True)
    assert both == await peer.session_key(extended=True)
    assert both[:64] == plain
    assert len(both) == 128
    for index in range(1, 7):
        assert await peer.exported_parameter(index) == await server.exported_parameter(index)
    assert await peer.peer_certificates() == (await server.certificate(),)
    assert (await peer.cipher_suite()).suite == (await server.cipher_suite()).suite
    assert await peer.key_block() == await server.key_block()
    await refused(0x6985, peer.key_block())  # given out once
    await peer.reset_state()
    await refused(0x6985, peer.session_key())


async def test_tls_parameters_are_parsed(tmp_path: Path) -> None:
    card = await personalised(new_store(tmp_path), CertificateAuthority(), ("vm", KeyAlgorithm.P_256))
    client = await ready_client(card, "vm")
    await client.set_tls_parameters(TlsParameters(server_name="localhost", alpn=("h2",)))
    await refused(0x6A80, client.set_tls_parameters(TlsParameters(suites=(0x0004,))))  # RC4
    assert card.process(bytes.fromhex("A082CC0003FFFFFF")) == b"\x6a\x80"


def test_any_bytes_are_answered(tmp_path_factory: pytest.TempPathFactory) -> None:
    card = CardOs(new_store(tmp_path_factory.mktemp("card")))

    @given(st.lists(st.one_of(st.binary(max_size=300), st.just(bytes.fromhex("00A404000711223344556601"))), max_size=5))
    def ask(commands: list[bytes]) -> None:
        for command in commands:
            assert 2 <= len(card.process(command)) <= 65535

    ask()
