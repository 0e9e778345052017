"""A lease leaves nothing to the next borrower, however it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from secfunet.apdu import PinError, StatusError
from secfunet.card import (
    CardClient,
    CardPort,
    EapState,
    KeyAlgorithm,
    LeaseEndedError,
    Segmentation,
    SingleCard,
    TlsParameters,
    connect_unix,
    ready_card,
)
from secfunet.card.administrator import open_secure_channel
from secfunet.card.parameters import TLS_1_2
from secfunet.tandem.card_link import EapCardLink
from secfunet.tandem.parameters import TandemParameters
from secure_element.card_os import CardOs
from secure_element.server import CardServer
from tests.support.local_card import KEYS, USER_PIN, new_store, personalised, ready_client
from tests.support.pki import CertificateAuthority


@dataclass
class World:
    """One served card with the identities "vm" (RSA: its ciphertexts need two short APDUs) and "other", and a pool in front of it."""

    authority: CertificateAuthority
    card: CardOs
    pool: SingleCard
    connections: list[CardPort] = field(default_factory=list)


class SlowPort:
    """Answers when it may: a card that is at work while its borrower loses patience."""

    def __init__(self, port: CardPort) -> None:
        self._port = port
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.answers_until_slow = -1

    async def transmit(self, command: bytes) -> bytes:
        response = await self._port.transmit(command)
        if self.answers_until_slow == 0:
            self.may_answer.clear()
        self.answers_until_slow -= 1
        await self.may_answer.wait()
        return response

    async def reset(self, *, cold: bool = False) -> bytes:
        return await self._port.reset(cold=cold)

    async def close(self) -> None:
        self.may_answer.set()
        await self._port.close()


@pytest_asyncio.fixture(params=list(Segmentation))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    authority = CertificateAuthority("CA")
    card = await personalised(
        new_store(tmp_path), authority, ("vm", KeyAlgorithm.RSA_2048), ("other", KeyAlgorithm.P_256)
    )
    path = tmp_path / "card.sock"
    made = World(authority, card, SingleCard(lambda: connect()))

    async def connect() -> CardClient:
        port = SlowPort(await connect_unix(path, timeout=2))
        made.connections.append(port)
        return await ready_card(port, pin=USER_PIN, identity="vm", segmentation=request.param)

    async with CardServer(card, path):
        yield made
        await made.pool.close()


async def nothing_is_left(world: World) -> None:
    """What the next borrower finds."""
    async with world.pool.lease(timeout=5) as card:
        assert await card.state() in (EapState.AUTHENTICATING, EapState.NOT_AUTHENTICATED)
        for ask in (card.key_block, card.cipher_suite, card.session_key, card.peer_certificates):
            with pytest.raises(StatusError) as refused:
                await ask()
            assert refused.value.sw == 0x6985
        assert await card.current_identity() == "vm"
        assert len(await card.sign(4, bytes(32))) == 256
        # The parameters are the defaults: a client, as a Start shows, which names no server.
        await card.reset_state()
        hello = await card.process_eap(bytes.fromhex("010000060D20"))
        assert b"victim.example" not in hello


async def test_finished_keys_are_not_for_the_next(world: World, tmp_path: Path) -> None:
    """The borrower is cut off between the last flight and KeyBlock; the handshake is one with a second card."""
    folder = tmp_path / "server"
    folder.mkdir()
    server_card = await personalised(new_store(folder), world.authority, ("server", KeyAlgorithm.P_256))
    server = EapCardLink(await ready_client(server_card, "server"), "server", TandemParameters(), "")
    async with world.pool.lease(timeout=5) as card:
        client = EapCardLink(card, "client", TandemParameters(max_version=TLS_1_2), "server")
        answer = await server.ask(await client.start())
        await client.ask(await server.ask(await client.ask(answer)))
        assert await card.state() is EapState.AUTHENTICATED
    await nothing_is_left(world)
    assert len(world.connections) == 1, "a tidy lease costs no connection"


async def test_parameters_and_a_running_handshake_are_not_for_the_next(world: World) -> None:
    async with world.pool.lease(timeout=5) as card:
        await card.set_tls_parameters(TlsParameters(server_name="victim.example", max_version=0x0303))
        await card.reset_state()
        assert b"victim.example" in await card.process_eap(bytes.fromhex("010000060D20"))
    async with world.pool.lease(timeout=5) as card:
        with pytest.raises(StatusError) as refused:  # the Start's successor: there is nothing to continue
            await card.process_eap(bytes.fromhex("020100060D00"))
        assert refused.value.sw == 0x7000
    await nothing_is_left(world)


async def test_identity_pin_and_reset_are_not_for_the_next(world: World) -> None:
    async with world.pool.lease(timeout=5) as card:
        await card.set_identity("other")
    await nothing_is_left(world)
    async with world.pool.lease(timeout=5) as card:
        await open_secure_channel(card, KEYS)
    await nothing_is_left(world)
    with pytest.raises(StatusError):
        async with world.pool.lease(timeout=5) as card:
            await card.generate_key("mine", KeyAlgorithm.P_256)
    async with world.pool.lease(timeout=5) as card:
        await card.port.reset()
    await nothing_is_left(world)
    connections = len(world.connections)
    async with world.pool.lease(timeout=5) as card:
        assert await card.pin_attempts() == 3  # asking changes nothing
    await nothing_is_left(world)
    assert len(world.connections) == connections


async def test_a_card_that_forgot_its_pin_is_made_ready_again(world: World) -> None:
    async with world.pool.lease(timeout=5):
        world.card.reset()
        world.card.process(bytes.fromhex("00A404000AF053656346754E657401"))  # selected, nobody verified
    with pytest.raises(PinError):
        async with world.pool.lease(timeout=5) as card:
            await card.sign(4, bytes(32))
    await nothing_is_left(world)


async def test_a_cancelled_exchange_is_not_continued_by_the_next(world: World) -> None:
    """A long command is cut off after each of its APDUs in turn: no part of it reaches the next borrower's answer."""
    for answers in range(4):
        async with world.pool.lease(timeout=5) as card:
            port = world.connections[-1]
            assert isinstance(port, SlowPort)
            ciphertext = await card.encrypt(1, b"for the next one")
            port.answers_until_slow = answers
            work = asyncio.create_task(card.decrypt(1, bytes(len(ciphertext))))
            await asyncio.wait([work], timeout=0.1)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            port.answers_until_slow = -1
        async with world.pool.lease(timeout=5) as card:
            assert await card.decrypt(1, ciphertext) == b"for the next one"


async def test_a_cancelled_lease_gives_the_card_back_at_once(world: World) -> None:
    """The task itself is cancelled in the middle of an APDU: the lock is free, and the client it held is dead."""
    held: list[CardClient] = []

    async def borrow() -> None:
        async with world.pool.lease(timeout=5) as card:
            held.append(card)
            port = world.connections[-1]
            assert isinstance(port, SlowPort)
            port.answers_until_slow = 0
            await card.sign(4, bytes(32))

    task = asyncio.create_task(borrow())
    await asyncio.sleep(0.1)
    task.cancel()
    async with asyncio.timeout(2):
        await asyncio.gather(task, return_exceptions=True)
        await nothing_is_left(world)
    with pytest.raises(LeaseEndedError):
        await held[0].state()
