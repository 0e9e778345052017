"""Several operations with a key at once: the same outcomes as one by one, in order, also when the card is lost between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gose.slots.port import GuardedPort
from secfunet.apdu import StatusError
from secfunet.card import CardClient, CardGoneError, KeyAlgorithm, Segmentation, connect_unix
from secfunet.card.client import KeyRequest
from secfunet.card.instructions import KeyOperation
from secfunet.card.vpcd import FrameDecoder, encode_frame
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority

PKCS1_SHA256 = 1  # deterministic: two cards, or two ways to one card, must give the same
DIGESTS = [bytes((number,)) * 32 for number in range(20)]


@pytest.fixture
async def card(tmp_path: Path) -> AsyncIterator[CardProcess]:
    async with running_card(tmp_path) as card:
        await personalise(card, CertificateAuthority("CA"), "vm", algorithm=KeyAlgorithm.RSA_2048)
        yield card


def signatures(digests: list[bytes]) -> list[KeyRequest]:
    return [(KeyOperation.SIGN, PKCS1_SHA256, digest) for digest in digests]


async def test_the_same_as_one_by_one(card: CardProcess) -> None:
    client = await card.connect("vm")
    at_once = await client.operate(signatures(DIGESTS))
    assert at_once == [await client.sign(PKCS1_SHA256, digest) for digest in DIGESTS]
    client.segmentation = Segmentation.DRAFT
    assert await client.operate(signatures(DIGESTS[:3])) == at_once[:3]
    await client.close()


async def test_a_refusal_touches_no_other(card: CardProcess) -> None:
    client = await card.connect("vm")
    first, refused, last = await client.operate(
        [*signatures(DIGESTS[:1]), *signatures([b"short"]), *signatures(DIGESTS[1:2])]
    )
    assert isinstance(refused, StatusError)
    assert refused.sw == 0x6A80
    assert [first, last] == await client.operate(signatures(DIGESTS[:2]))
    await client.close()


async def test_a_cancelled_handful_does_not_shift_the_answers(card: CardProcess) -> None:
    client = await card.connect("vm")
    expected = await client.sign(PKCS1_SHA256, DIGESTS[-1])
    for turns in range(4):
        task = asyncio.create_task(client.operate(signatures(DIGESTS[:8])))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        assert await client.sign(PKCS1_SHA256, DIGESTS[-1]) == expected
    await client.close()


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("answered", [0, 1, 3])
async def test_a_card_that_is_lost_in_the_middle(tmp_path: Path, answered: int, guarded: bool) -> None:
    """What it had answered counts; then comes the loss, and nothing after it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder, left = FrameDecoder(), answered
        while data := await reader.read(65536):
            for body in decoder.feed(data):
                if body == b"\4":
                    writer.write(encode_frame(b"\x3b\x80"))
                elif len(body) > 1 and left:
                    left -= 1
                    writer.write(encode_frame(b"signature\x90\x00"))
                elif len(body) > 1:
                    writer.close()
                    return

    path = tmp_path / "card.sock"
    async with await asyncio.start_unix_server(serve, str(path)):
        port = await connect_unix(path, timeout=5)
        guard = GuardedPort(port, timeout=5)
        client = CardClient(guard if guarded else port)
        outcomes = await client.operate(signatures(DIGESTS[:5]))
        assert outcomes[:-1] == [b"signature"] * answered
        assert isinstance(outcomes[-1], CardGoneError)
        assert guard.is_lost == guarded
        await client.close()
