"""Two real card processes do a whole TLS handshake, through CardClient and both ways of segmentation, and hand over the same keys."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from secfunet.apdu import StatusError
from secfunet.card import CardClient, KeyAlgorithm, Segmentation
from secfunet.card.parameters import EapState, TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.eap_tls import ACK, EapTlsMessage
from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from tests.support.cards import personalise, running_card
from tests.support.pki import CertificateAuthority

pytestmark = pytest.mark.e2e


class DockingHost:
    """Wraps TLS flights for one card, as the published bridge does: one packet in, fragments out."""

    def __init__(self, card: CardClient, *, is_client: bool) -> None:
        self.card = card
        self._code = EapCode.REQUEST if is_client else EapCode.RESPONSE
        self._identifier = 0

    async def begin(self, parameters: TlsParameters) -> None:
        await self.card.set_tls_parameters(parameters)
        await self.card.reset_state()
        assert await self.card.state() is EapState.AUTHENTICATING

    async def _exchange(self, message: EapTlsMessage) -> EapTlsMessage:
        self._identifier = (self._identifier + 1) & 0xFF
        packet = EapPacket(self._code, self._identifier, EapType.TLS, message.encode())
        answer = EapPacket.decode(await self.card.process_eap(packet.encode(), int(time.time())))
        assert answer.type == EapType.TLS
        return EapTlsMessage.decode(answer.data)

    async def give(self, message: EapTlsMessage) -> bytes:
        answer = await self._exchange(message)
        flight = answer.data
        while answer.more:
            answer = await self._exchange(ACK)
            flight += answer.data
        return flight

    async def start(self) -> bytes:
        return await self.give(EapTlsMessage(start=True))

    async def flight(self, records: bytes) -> bytes:
        return await self.give(EapTlsMessage(records))


async def handshake(client: DockingHost, server: DockingHost) -> None:
    """To the end; tickets go to the client's card."""
    flight = await client.start()
    while flight:
        flight = await server.flight(flight)
        if flight:
            flight = await client.flight(flight)
    assert await client.card.state() is EapState.AUTHENTICATED
    assert await server.card.state() is EapState.AUTHENTICATED


@asynccontextmanager
async def two_cards(
    folder: Path, algorithm: KeyAlgorithm, segmentations: tuple[Segmentation, Segmentation]
) -> AsyncIterator[tuple[DockingHost, DockingHost, tuple[bytes, bytes]]]:
    authority = CertificateAuthority()
    async with AsyncExitStack() as stack:
        clients, certificates = [], []
        for name, segmentation in zip(("client", "server"), segmentations, strict=True):
            card = await stack.enter_async_context(running_card(folder, name=name))
            certificates.append(await personalise(card, authority, name, algorithm=algorithm))
            client = await card.connect(name, segmentation=segmentation)
            stack.push_async_callback(client.close)
            clients.append(client)
        yield (
            DockingHost(clients[0], is_client=True),
            DockingHost(clients[1], is_client=False),
            (certificates[0], certificates[1]),
        )


@pytest.mark.parametrize("algorithm", [KeyAlgorithm.P_256, KeyAlgorithm.RSA_2048])
@pytest.mark.parametrize(
    "segmentations",
    list(itertools.product(Segmentation, repeat=2)),
    ids=lambda pair: "-".join(one.value for one in pair),
)
async def test_handshakes_between_processes(
    tmp_path: Path, algorithm: KeyAlgorithm, segmentations: tuple[Segmentation, Segmentation]
) -> None:
    async with two_cards(tmp_path, algorithm, segmentations) as (client, server, certificates):
        for version, resumed in itertools.product((TLS_1_2, TLS_1_3), (False, True)):
            await client.begin(
                TlsParameters(server_name="server", min_version=version, max_version=version, alpn=("h2",))
            )
            await server.begin(TlsParameters(role="server", alpn=("h2",)))
            await handshake(client, server)
            at_client, at_server = await client.card.cipher_suite(), await server.card.cipher_suite()
            assert (at_client.version, at_client.suite, at_client.alpn) == (at_server.version, at_server.suite, "h2")
            assert at_client.version == version
            assert at_client.resumed is at_server.resumed is resumed
            assert await client.card.peer_certificates() == (certificates[1],)
            assert await server.card.peer_certificates() == (certificates[0],)
            key_block = await client.card.key_block()
            suite = SUITES[at_client.suite]
            assert len(key_block) == (suite.key_block_length if version == TLS_1_2 else 2 * suite.hash_length)
            assert key_block == await server.card.key_block()
            for card in (client.card, server.card):
                with pytest.raises(StatusError) as again:
                    await card.key_block()
                assert again.value.sw == 0x6985
            assert await client.card.session_key() == await server.card.session_key()
            assert await client.card.session_key(extended=True) == await server.card.session_key(extended=True)
            assert await client.card.exported_parameter(4) == await server.card.exported_parameter(4)


@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_a_stranger_between_processes(tmp_path: Path, segmentation: Segmentation) -> None:
    """The alert is an ordinary answer, then comes 7001; the card serves the next one."""
    ours, theirs = CertificateAuthority(), CertificateAuthority("Theirs")
    async with (
        running_card(tmp_path, name="client") as client_card,
        running_card(tmp_path, name="server") as server_card,
    ):
        await personalise(client_card, theirs, "stranger", authorities=(ours.der,))
        await personalise(client_card, ours, "friend")
        await personalise(server_card, ours, "server")
        at_client = await client_card.connect("stranger", segmentation=segmentation)
        at_server = await server_card.connect("server", segmentation=segmentation)
        client, server = DockingHost(at_client, is_client=True), DockingHost(at_server, is_client=False)
        await client.begin(TlsParameters(max_version=TLS_1_2))
        await server.begin(TlsParameters(role="server"))
        flight = await client.flight(await server.flight(await client.start()))
        alert = await server.flight(flight)
        assert alert == bytes((21, 3, 3, 0, 2, 2, AlertDescription.UNKNOWN_CA))
        with pytest.raises(StatusError) as failure:
            await server.give(ACK)
        assert failure.value.sw == 0x7001
        with pytest.raises(StatusError) as heard:
            await client.flight(alert)
        assert heard.value.sw == 0x7001
        assert await at_client.state() is await at_server.state() is EapState.NOT_AUTHENTICATED
        with pytest.raises(StatusError):
            await at_server.key_block()
        await at_client.set_identity("friend")
        await client.begin(TlsParameters())
        await server.begin(TlsParameters(role="server"))
        await handshake(client, server)
        assert await at_client.key_block() == await at_server.key_block()
        await at_client.close()
        await at_server.close()


async def test_legacy_suites_need_the_cards_setting(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    asked = TlsParameters(suites=(0x002F,))
    async with running_card(tmp_path, name="modern") as modern:
        await personalise(modern, authority, "one", algorithm=KeyAlgorithm.RSA_2048)
        client = await modern.connect("one")
        with pytest.raises(StatusError) as refusal:
            await client.set_tls_parameters(asked)
        assert refusal.value.sw == 0x6A80
        await client.close()
    async with running_card(tmp_path, name="old", settings="legacy_tls = true") as old:
        await personalise(old, authority, "one", algorithm=KeyAlgorithm.RSA_2048)
        client = await old.connect("one")
        host = DockingHost(client, is_client=True)
        await host.begin(asked)
        hello = await host.start()
        # session id of none: suites at offset 5 + 4 + 2 + 32 + 1.
        assert bytes.fromhex("002f") in hello[44:50]
        await client.close()


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
async def test_full_eap_between_processes(tmp_path: Path, version: int) -> None:
    """Identity, EAP-TLS, EAP-Success: the peer's host and the authenticator's only carry packets, in short APDUs."""
    async with two_cards(tmp_path, KeyAlgorithm.P_256, (Segmentation.DRAFT, Segmentation.DRAFT)) as (peer, server, _):
        await peer.card.set_tls_parameters(TlsParameters(min_version=version, max_version=version))
        await server.card.set_tls_parameters(TlsParameters(role="server"))
        packet = EapPacket(EapCode.REQUEST, 1, EapType.IDENTITY).encode()
        packets = 0
        while answer := await peer.card.process_eap(packet):
            packet = await server.card.process_eap(answer)
            packets += 1
        assert packets >= 4
        assert EapPacket.decode(packet).code is EapCode.SUCCESS
        assert await peer.card.state() is await server.card.state() is EapState.AUTHENTICATED
        keys = await peer.card.session_key(extended=True)
        assert len(keys) == 128
        assert keys == await server.card.session_key(extended=True)
        # The published trace gives the halves of the MSK in the other order; that is the card's default.
        assert await peer.card.session_key() == keys[32:64] + keys[:32]
        for index in range(1, 7):
            assert await peer.card.exported_parameter(index) == await server.card.exported_parameter(index)
