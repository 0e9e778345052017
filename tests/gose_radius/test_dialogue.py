"""Whatever a peer says in whatever order: an answer, never an accept, and no place and no card is kept."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyrad.packet import AuthPacket

from gose.radius.dialogue import Dialogues, NotAdmittedError, rejection
from gose.radius.packets import encode_reply, parse_request
from gose.settings import Limits
from gose.slots.shares import share
from secfunet.apdu import CommandApdu
from secfunet.card import KeyAlgorithm, SingleCard, TlsParameters, ready_card
from secfunet.card.instructions import MethodFunction
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.radius.wire import Attribute, Code
from secure_element.card_os import CardOs
from secure_element.eap_engine import EapDiscarded, EapEngine, EapFailure
from tests.gose_radius.peer import SECRET, RadiusClient
from tests.secure_element_tls.pki import authority, tls_id
from tests.support.local_card import USER_PIN, LocalPort, new_store, personalised, ready_client
from tests.support.pki import CertificateAuthority

STRANGER = tls_id(authority(), "stranger")  # of an authority that the card does not trust
PLACES = 4

packets = st.one_of(
    st.just(("peer", 0, b"")),  # what an honest peer says next
    st.tuples(st.just("changed"), st.integers(0, 2**16), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just("eap"), st.integers(0, 255), st.binary(max_size=64)),
    st.tuples(st.just("tls"), st.integers(0, 255), st.binary(max_size=64)),
    st.tuples(st.just("bytes"), st.just(0), st.binary(max_size=64)),
)
HONEST = (("peer", 0, b""), "its own")
said = st.builds(
    lambda steps, rest: [HONEST] * steps + rest,  # some way into a handshake first
    st.integers(0, 5),
    st.lists(st.tuples(packets, st.sampled_from(("its own", "none", "another"))), max_size=12),
)


@pytest.fixture(scope="module")
def card() -> Iterator[CardOs]:
    with TemporaryDirectory() as folder:
        store = new_store(Path(folder))
        yield asyncio.run(personalised(store, CertificateAuthority("of the grid"), ("server", KeyAlgorithm.P_256)))


@given(said=said)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_in_any_order(card: CardOs, said: list[tuple[tuple[str, int, bytes], str]]) -> None:
    asyncio.run(talk(card, said))


def nobody(certificate: bytes) -> str:
    raise NotAdmittedError("nobody is let in here")


async def talk(card: CardOs, said: list[tuple[tuple[str, int, bytes], str]]) -> None:
    pool = SingleCard(lambda: ready_client(card, "server"))
    _, part = share(pool, lambda: 1, "logins", "RADIUS")
    dialogues = Dialogues(part, nobody, Limits(handshakes=PLACES, server_card_timeout=0.05))
    peer = EapEngine(randbytes=os.urandom, legacy_tls=False)
    peer.select_identity(STRANGER)
    peer.reset_state()
    heard, state = EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode(), None
    for (kind, number, data), whose in said:
        eap = spoken(peer, heard, kind, number, data)
        sent = {"its own": state, "none": None, "another": os.urandom(16)}[whose]
        request = parse_request(RadiusClient().request(eap, sent)[1], SECRET)
        reply = await dialogues.answer("127.0.0.1", request)
        assert reply.code in {Code.ACCESS_CHALLENGE, Code.ACCESS_REJECT}
        if reply.code == Code.ACCESS_CHALLENGE:
            assert EapPacket.decode(reply.eap).code is EapCode.REQUEST
            if reply.state is not None:
                heard, state = reply.eap, reply.state
        assert len(dialogues) <= PLACES
    await dialogues.close()
    assert len(dialogues) == 0
    async with pool.lease(timeout=1):
        pass
    await pool.close()


def spoken(peer: EapEngine, heard: bytes, kind: str, number: int, data: bytes) -> bytes:
    match kind:
        case "peer" | "changed":
            try:
                honest = peer.process(heard)
            except (EapDiscarded, EapFailure):
                return b""
            if kind == "changed" and honest:
                at = number % len(honest)
                return honest[:at] + bytes((honest[at] ^ (data[0] or 1),)) + honest[at + 1 :]
            return honest
        case "eap":
            return EapPacket(EapCode.RESPONSE, number, 1 + number % 60, data).encode()
        case "tls":
            return EapPacket(EapCode.RESPONSE, number, EapType.TLS, data).encode()
        case _:
            return data


class OlderPort(LocalPort):
    """A card of a version before item 09 of its TLS parameters, which it refuses."""

    refused = 0

    async def transmit(self, command: bytes) -> bytes:
        apdu = CommandApdu.decode(command)
        if apdu.p1 == MethodFunction.SET_TLS_PARAMETERS and TlsParameters.decode(apdu.data).eap_mtu is not None:
            self.refused += 1
            return b"\x6a\x80"
        return await super().transmit(command)


async def test_a_card_of_an_earlier_version_serves_links_that_say_what_they_carry(card: CardOs) -> None:
    port = OlderPort(card)
    pool = SingleCard(lambda: ready_card(port, pin=USER_PIN, identity="server"))
    _, part = share(pool, lambda: 1, "logins", "RADIUS")
    dialogues = Dialogues(part, nobody, Limits(handshakes=PLACES))
    peer = EapEngine(randbytes=os.urandom, legacy_tls=False)
    peer.select_identity(STRANGER)
    peer.reset_state()
    heard, state = EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode(), None
    for _ in range(2):  # the identity, and a ClientHello
        request = parse_request(RadiusClient().request(peer.process(heard), state, mtu=1400)[1], SECRET)
        reply = await dialogues.answer("127.0.0.1", request)
        assert reply.code == Code.ACCESS_CHALLENGE
        heard, state = reply.eap, reply.state
    assert port.refused == 1
    await dialogues.close()
    await pool.close()


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_rejection_fits_wherever_its_request_did(length: int) -> None:
    room = 4096 - 20 - 18 - (2 + length)
    values = [bytes(253)] * (room // 255)
    left = room - 255 * len(values)
    packet = AuthPacket(id=1, secret=SECRET, authenticator=os.urandom(16))
    packet[Attribute.EAP_MESSAGE.value] = [bytes(length)]
    packet[Attribute.PROXY_STATE.value] = [*values, bytes(left - 2)]
    packet.add_message_authenticator()
    raw = packet.RequestPacket()
    assert len(raw) == 4096
    request = parse_request(raw, SECRET)
    assert len(encode_reply(request, rejection(request))) <= 4096
