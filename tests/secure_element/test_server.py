"""The socket: one client at a time, frames as vpcd has them, and a card that answers to reset while it makes a key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secfunet.apdu import CommandApdu, PinError, StatusError
from secfunet.card import (
    CardBusyError,
    CardClient,
    CardGoneError,
    CardOpener,
    CardPort,
    KeyAlgorithm,
    LeaseEndedError,
    SingleCard,
    connect_unix,
)
from secfunet.scp03 import HostChannel, HostHandshake, SecurityLevel
from secfunet.service.unix_socket import SocketInUse, SocketPathError
from secure_element.card_os import ATR, CardOs
from secure_element.server import CardServer
from tests.support.local_card import KEYS, USER_PIN, new_store, personalised
from tests.support.pki import CertificateAuthority


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Path]:
    """A card in this process behind a real socket."""
    path = tmp_path / "card.sock"
    async with CardServer(CardOs(new_store(tmp_path)), path):
        yield path


async def raw(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(path))


def frame(body: bytes) -> bytes:
    return struct.pack(">H", len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))


SELECT = bytes.fromhex("00A404000711223344556601")


async def test_frames_and_controls(served: Path) -> None:
    reader, writer = await raw(served)
    writer.write(frame(b"\4"))
    assert await read_frame(reader) == ATR
    writer.write(frame(b"\1") + frame(SELECT) + frame(bytes.fromhex("A020000000")))
    assert await read_frame(reader) == b"\x90\0"
    assert await read_frame(reader) == b"\x63\x03"
    writer.write(frame(b"\2") + frame(b"\4") + frame(bytes.fromhex("A020000000")))
    assert await read_frame(reader) == ATR  # power on and reset are not answered
    assert await read_frame(reader) == b"\x69\x99"  # the reset deselected
    for byte in frame(SELECT):
        writer.write(bytes((byte,)))
        await asyncio.sleep(0)
    assert await read_frame(reader) == b"\x90\0"
    writer.close()


@pytest.mark.parametrize("garbage", [b"\0\0", frame(SELECT), frame(b"\7")])
async def test_no_frame_or_no_power_ends_the_connection(served: Path, garbage: bytes) -> None:
    reader, writer = await raw(served)
    writer.write(garbage)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    await (await connect_unix(served, timeout=2)).close()


async def test_a_second_client_is_turned_away_and_the_first_is_not_disturbed(served: Path) -> None:
    first = await connect_unix(served, timeout=2)
    for _ in range(3):
        with pytest.raises(CardBusyError):
            await connect_unix(served, timeout=2)
    assert await first.transmit(SELECT) == b"\x90\0"
    await first.close()
    await (await connect_unix(served, timeout=2)).close()


async def test_clients_in_quick_succession_find_the_card_free(served: Path) -> None:
    for _ in range(100):
        port = await connect_unix(served, timeout=2)
        assert await port.transmit(SELECT) == b"\x90\0"
        await port.close()


async def test_what_one_client_opened_the_next_does_not_have(served: Path) -> None:
    client = CardClient(await connect_unix(served, timeout=2))
    await client.select()
    await client.verify_pin(USER_PIN)
    await client.close()
    port = await connect_unix(served, timeout=2)
    assert (await port.transmit(bytes.fromhex("A019000001")))[:1] == b"\x69"
    await port.transmit(SELECT)
    assert await port.transmit(bytes.fromhex("A019000001")) == b"\x63\x03"
    await port.close()


async def test_atr_is_given_while_a_key_is_made_and_leaving_does_not_hurt(served: Path) -> None:
    client = CardClient(await connect_unix(served, timeout=2))
    await client.close()
    reader, writer = await raw(served)
    channel = await administrator(reader, writer)
    make = channel.wrap(CommandApdu(0x80, 0x46, KeyAlgorithm.RSA_4096, 0, b"big")).encode()
    name = channel.wrap(CommandApdu(0xA0, 0x18, 0, 0, le=256)).encode()
    writer.write(frame(make) + frame(b"\4") + frame(name))
    assert await read_frame(reader) == ATR
    assert await asyncio.wait_for(read_frame(reader), 60) == b"\x90\0"
    assert await read_frame(reader) == b"big\x90\0"  # what came meanwhile waited its turn
    writer.write(frame(channel.wrap(CommandApdu(0x80, 0x46, KeyAlgorithm.RSA_4096, 0, b"two")).encode()))
    await asyncio.sleep(0.05)
    writer.transport.abort()  # in the middle of the work
    client = await until_free(served)
    await client.select()
    await client.verify_pin(USER_PIN)
    assert await client.identities() == ("big", "two")
    await client.close()


async def administrator(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> HostChannel:
    """Powers the card on and opens a channel that protects commands only."""
    handshake = HostHandshake(KEYS.keys, os.urandom(8))
    writer.write(frame(b"\1") + frame(SELECT) + frame(handshake.initialize_update.encode()))
    assert await read_frame(reader) == b"\x90\0"
    answer = await read_frame(reader)
    writer.write(frame(handshake.authenticate(answer[:-2], SecurityLevel.C_MAC_C_DEC).encode()))
    assert await read_frame(reader) == b"\x90\0"
    return handshake.channel


async def until_free(path: Path) -> CardClient:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(CardBusyError):
                return CardClient(await connect_unix(path, timeout=2))


async def test_too_many_commands_at_once_end_the_connection(served: Path) -> None:
    reader, writer = await raw(served)
    channel = await administrator(reader, writer)
    make = channel.wrap(CommandApdu(0x80, 0x46, KeyAlgorithm.RSA_4096, 0, b"big")).encode()
    writer.write(frame(make) + frame(SELECT) * 100)
    with contextlib.suppress(ConnectionResetError):
        assert len(await reader.read()) <= 8
    writer.close()


async def test_what_follows_a_reason_to_drop_is_not_obeyed(served: Path) -> None:
    reader, writer = await raw(served)
    wrong = bytes.fromhex("A020000008") + b"99999999"
    writer.write(frame(b"\1") + frame(SELECT) + frame(b"\7") + frame(b"\1") + frame(SELECT) + frame(wrong) * 3)
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    writer.close()
    client = await until_free(served)
    await client.select()
    assert await client.pin_attempts() == 3
    await client.close()


async def test_answers_that_nobody_reads_do_not_pile_up(tmp_path: Path) -> None:
    """A burst of short commands with long answers ends the connection after about a megabyte of them."""
    card = await personalised(new_store(tmp_path), CertificateAuthority("CA"), ("vm", KeyAlgorithm.RSA_2048))
    path, sizes = tmp_path / "burst.sock", []
    pin = bytes.fromhex("A020000008") + USER_PIN + b"\xff" * 4
    get_profile = bytes.fromhex("A01A00000000") + b"\0"
    async with CardServer(card, path, observe=lambda name, sw, took: sizes.append((name, sw))):
        reader, writer = await raw(path)
        assert isinstance(writer.transport, asyncio.Transport)
        writer.transport.pause_reading()
        writer.write(frame(b"\1") + frame(SELECT) + frame(pin) + frame(get_profile) * 20_000)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                await writer.drain()
                await writer.wait_closed() if writer.is_closing() else await asyncio.sleep(0.5)
        done = sizes.count(("get-profile-data", 0x9000))
        assert 0 < done < 4000
        writer.transport.abort()
        client = await until_free(path)
        await client.select()
        await client.close()
        del reader


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_the_socket_is_private_and_a_second_server_is_refused(served: Path, tmp_path: Path) -> None:
    assert mode_of(served) == 0o600
    (tmp_path / "other").mkdir()
    card = CardOs(new_store(tmp_path / "other"))
    with pytest.raises(SocketInUse):
        await CardServer(card, served).__aenter__()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SocketPathError, match="is no socket"):
        await CardServer(card, tmp_path / "file").__aenter__()
    assert (tmp_path / "file").read_text() == "precious"


async def test_no_card_and_a_card_that_goes(tmp_path: Path) -> None:
    with pytest.raises(CardGoneError):
        await connect_unix(tmp_path / "none.sock", timeout=1)
    path = tmp_path / "card.sock"
    async with CardServer(CardOs(new_store(tmp_path)), path):
        port = await connect_unix(path, timeout=2)
    with pytest.raises(CardGoneError):
        await port.transmit(SELECT)
    with pytest.raises(CardGoneError):
        await port.reset()
    await port.close()
    assert not path.exists()


async def test_a_cancelled_command_does_not_shift_the_answers(served: Path) -> None:
    port = await connect_unix(served, timeout=2)
    for _ in range(20):
        cancelled = asyncio.create_task(port.transmit(bytes.fromhex("FFFFFFFF")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled
        assert await port.transmit(SELECT) == b"\x90\0"
        assert await port.reset() == ATR
    await port.close()


async def test_a_card_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(6)
        writer.write(frame(ATR))
        await reader.read()
        writer.close()

    path = tmp_path / "silent.sock"
    async with await asyncio.start_unix_server(silent, str(path)):
        port = await connect_unix(path, timeout=2, answer_timeout=0.1)
        with pytest.raises(CardGoneError):
            await port.transmit(SELECT)
        await port.close()


async def test_an_empty_answer_means_the_card_is_gone(tmp_path: Path) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(6)
        writer.write(frame(ATR))
        await reader.readexactly(2)
        writer.write(frame(b"\x90"))
        await reader.read()
        writer.close()

    path = tmp_path / "broken.sock"
    async with await asyncio.start_unix_server(broken, str(path)):
        port = await connect_unix(path, timeout=2)
        with pytest.raises(CardGoneError):
            await port.transmit(SELECT)
        await port.close()


# The pool


def pool_of(path: Path) -> tuple[SingleCard, list[int]]:
    connections: list[int] = []

    async def connect() -> CardClient:
        client = CardClient(await connect_unix(path, timeout=2))
        await client.select()
        await client.verify_pin(USER_PIN)
        connections.append(len(connections))
        return client

    return SingleCard(connect), connections


async def test_leases_are_exclusive_and_in_order(served: Path) -> None:
    pool, connections = pool_of(served)
    order: list[int] = []
    inside = 0

    async def work(number: int) -> None:
        nonlocal inside
        async with pool.lease(timeout=10) as card:
            inside += 1
            assert inside == 1
            assert await card.pin_attempts() == 3
            order.append(number)
            inside -= 1

    await asyncio.gather(*(work(number) for number in range(20)))
    assert order == list(range(20))
    assert connections == [0]  # one connection served them all
    await pool.close()


async def test_a_lease_ends(served: Path) -> None:
    pool, _ = pool_of(served)
    async with pool.lease(timeout=10) as card:
        with pytest.raises(CardBusyError):
            async with pool.lease(timeout=0.05):
                pytest.fail("two leases at once")
    with pytest.raises(LeaseEndedError):
        await card.state()
    async with pool.lease(timeout=10) as again:
        assert await again.pin_attempts() == 3
    await pool.close()


async def test_a_refusal_keeps_the_connection_and_a_reset_does_not(served: Path) -> None:
    pool, connections = pool_of(served)
    with pytest.raises(StatusError):
        async with pool.lease(timeout=10) as card:
            await card.current_identity()
    assert connections == [0]
    async with pool.lease(timeout=10) as card:
        await card.port.reset()
    async with pool.lease(timeout=10) as card:
        await card.reset_state()  # the PIN has been verified again
    assert connections == [0, 1]
    await pool.close()


async def test_a_lost_card_is_connected_again(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    store = new_store(tmp_path)
    pool, connections = pool_of(path)
    async with CardServer(CardOs(store), path), pool.lease(timeout=10) as card:
        await card.reset_state()
    with pytest.raises(CardGoneError):
        async with pool.lease(timeout=10) as card:
            await card.reset_state()
    with pytest.raises(CardGoneError):
        async with pool.lease(timeout=10):
            pytest.fail("there is no card")
    async with CardServer(CardOs(store), path):
        async with pool.lease(timeout=10) as card:
            await card.reset_state()
        await pool.close()
    assert connections == [0, 1]


async def test_a_wrong_pin_is_tried_once(served: Path) -> None:
    async def connect() -> CardPort:
        return await connect_unix(served, timeout=2)

    pins = [b"9999"]
    pool = SingleCard(CardOpener(connect, lambda: pins[-1]))
    for _ in range(5):
        with pytest.raises(PinError) as wrong:
            async with pool.lease(timeout=2):
                pytest.fail("the PIN is wrong")
        assert wrong.value.attempts_remaining == 2
    client = CardClient(await connect_unix(served, timeout=2))
    await client.select()
    assert await client.pin_attempts() == 2
    await client.close()
    pins.append(USER_PIN)  # somebody corrects the file
    async with pool.lease(timeout=2) as card:
        assert await card.pin_attempts() == 3
    await pool.close()


async def test_any_bytes_leave_a_card_that_serves(served: Path) -> None:
    chance = random.Random(35963)  # noqa: S311 - noise
    for _ in range(150):
        reader, writer = await raw(served)
        writer.write(frame(b"\1"))
        for _ in range(chance.randrange(6)):
            size = chance.randrange(1, 40)
            writer.write(frame(chance.randbytes(size)) if chance.random() < 0.8 else chance.randbytes(size))
        await asyncio.sleep(0)
        writer.transport.abort()
        del reader
    client = await until_free(served)
    await client.select()
    await client.close()
