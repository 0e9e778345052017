"""tlslite-ng as a client of TLS-Tandem, record by record: closes, refusals, cuts, orders, limits, key updates, alerts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tlslite.constants import KeyUpdateMessageType
from tlslite.errors import TLSError, TLSRemoteAlert

from secfunet.tandem.aio import TandemServer, start_tandem_server
from secfunet.tandem.parameters import TandemParameters
from tests.gose_racs.node import settle
from tests.peers.record_peer import (
    ALERT,
    CERTIFICATE,
    CERTIFICATE_VERIFY,
    CHANGE_CIPHER_SPEC,
    DATA,
    FINISHED,
    HANDSHAKE,
    TLS_1_2,
    TLS_1_3,
    Bend,
    Closed,
    Record,
    RecordPeer,
    messages,
)
from tests.peers.test_stacks import Echo
from tests.tandem.conftest import Cards, Pools
from tests.tandem.peers import Files
from tests.tandem.test_both_ends import port_of

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]
VERSIONS = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["TLSv1.2", "TLSv1.3"])
SOON = 3.0
"""Seconds: less than the docking host's patience for a peer, which nobody is to wait for here."""
Result = TypeVar("Result")


class Place:
    """A listener with the one server card, and clients for it."""

    def __init__(self, server: TandemServer, own: tuple[Path, Path], ends: list[Exception | None]) -> None:
        self.port = port_of(server)
        self.own = own
        self.ends = ends
        self.made = 0

    def peer(
        self, version: tuple[int, int], bend: Bend | None = None, *, files: tuple[Path, Path] | None = None
    ) -> RecordPeer:
        peer = RecordPeer(self.port, version, files or self.own)
        if bend is not None:
            peer.bend = bend
        return peer

    async def honest(self, version: tuple[int, int]) -> None:
        """Somebody else is served, and soon."""

        def talk() -> float:
            began = time.monotonic()
            peer = self.peer(version)
            try:
                peer.shake_hands()
                assert peer.echo(b"hello") == b"hello"
                return time.monotonic() - began
            finally:
                peer.close()

        assert await asyncio.to_thread(talk) < SOON


@pytest.fixture
async def place(pools: Pools, files: Files) -> AsyncIterator[Place]:
    ends: list[Exception | None] = []

    class Counted(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            place.made += 1

    server = await start_tandem_server(
        lambda: Counted(ends), pools.server("ec"), host="127.0.0.1", parameters=TandemParameters()
    )
    async with server:
        certificate, key = files.leaf()  # written over by the next one that a test asks for
        own = (certificate.rename(certificate.with_name("own.pem")), key.rename(key.with_name("own.key")))
        place = Place(server, own, ends)
        yield place
        server.abort_connections()
    await settle(lambda: len(ends) == place.made)


async def run(act: Callable[[], Result]) -> Result:
    """In a thread, as tlslite blocks; within the time that nobody is to wait."""
    began = time.monotonic()
    result = await asyncio.to_thread(act)
    assert time.monotonic() - began < SOON
    return result


# ---- a close at each point


@VERSIONS
async def test_a_close_at_each_point(place: Place, version: tuple[int, int]) -> None:
    """The next client is not kept waiting, and each connection that was made is told that it is lost."""

    def close_at(place_of_end: int) -> bool:
        """Whether the handshake was over before."""
        sent = 0

        def bend(kind: int, content: bytes) -> list[Record]:
            nonlocal sent
            sent += 1
            if sent > place_of_end:
                peer.flush()
                peer.close()
                raise Closed
            return [(kind, content)]

        peer = place.peer(version, bend)
        try:
            peer.shake_hands()
            peer.flush()
        except Closed:
            return False
        finally:
            peer.close()
        return True

    point, is_over = 0, False
    while not is_over:
        is_over = await asyncio.to_thread(close_at, point)
        await place.honest(version)
        point += 1
    assert point >= 3
    await settle(lambda: len(place.ends) == place.made)


# ---- what is refused


def flip(wanted: int) -> Bend:
    """Changes the last byte of that handshake message."""

    def bend(kind: int, content: bytes) -> list[Record]:
        if kind != HANDSHAKE:
            return [(kind, content)]
        changed = b""
        for message, raw in messages(content):
            changed += raw[:-1] + bytes((raw[-1] ^ 1,)) if message == wanted else raw
        return [(kind, changed)]

    return bend


REFUSED = {
    "foreign": (None, {"unknown_ca"}),
    "expired": (None, {"certificate_expired"}),
    "CertificateVerify": (flip(CERTIFICATE_VERIFY), {"decrypt_error", "bad_certificate"}),
    "Finished": (flip(FINISHED), {"decrypt_error"}),
}


@VERSIONS
@pytest.mark.parametrize("what", REFUSED)
async def test_a_refusal_is_one_alert_and_a_line_of_the_cards_log(
    place: Place, files: Files, cards: Cards, version: tuple[int, int], what: str
) -> None:
    bend, alerts = REFUSED[what]
    own = files.leaf(is_foreign=what == "foreign", expired=what == "expired")
    await asyncio.sleep(1.05)  # a line a second for a reason
    before = len(cards.server.log.read_text())

    def talk() -> tuple[str, list[tuple[int, int]]]:
        peer = place.peer(version, bend, files=own)
        try:
            alert = ""
            try:
                peer.shake_hands()
            except TLSRemoteAlert as error:
                alert = str(error).partition(":")[0]
            alert = alert or peer.alert()
            peer.wire.drain()
            return alert, peer.wire.records
        finally:
            peer.close()

    alert, records = await run(talk)
    assert alert in alerts
    kinds = [kind for kind, _ in records]
    if version == TLS_1_2:
        assert kinds.count(ALERT) == 1
        assert kinds[-1] == ALERT
    else:
        # An alert in the protection of the handshake: a record of two bytes, the type and the tag; nothing behind it, nothing in clear.
        assert ALERT not in kinds
        assert [size for _, size in records].count(2 + 1 + 16) == 1
        assert records[-1] == (DATA, 2 + 1 + 16)
    lines = [
        line
        for line in cards.server.log.read_text()[before:].splitlines()
        if "authentication of server-ec failed" in line
    ]
    assert len(lines) == 1, lines
    await place.honest(version)
    assert len(place.ends) <= place.made


# ---- cuts, joins, orders


def cut(size: int) -> Bend:
    """Handshake messages in records of so many bytes; change_cipher_spec, alerts and data as they are."""

    def bend(kind: int, content: bytes) -> list[Record]:
        if kind != HANDSHAKE:
            return [(kind, content)]
        return [(kind, content[at : at + size]) for at in range(0, len(content), size)]

    return bend


@VERSIONS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 15, 16, 17, 35, 36, 51, 52, 64, 100, 255])
async def test_messages_cut_anywhere(place: Place, version: tuple[int, int], size: int) -> None:
    def talk() -> bytes:
        peer = place.peer(version, cut(size))
        try:
            peer.shake_hands()
            return peer.echo(b"x" * 1000)
        finally:
            peer.close()

    assert await run(talk) == b"x" * 1000


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        (TLS_1_2, CERTIFICATE),
        (TLS_1_2, CERTIFICATE_VERIFY),
        (TLS_1_2, FINISHED),
        (TLS_1_3, CERTIFICATE),
        (TLS_1_3, CERTIFICATE_VERIFY),
        (TLS_1_3, FINISHED),
    ],
)
async def test_a_message_twice_is_refused_at_once(place: Place, version: tuple[int, int], wanted: int) -> None:
    def bend(kind: int, content: bytes) -> list[Record]:
        if kind != HANDSHAKE:
            return [(kind, content)]
        return [(kind, b"".join(raw * (1 + (message == wanted)) for message, raw in messages(content)))]

    def talk() -> str:
        peer = place.peer(version, bend)
        try:
            with contextlib.suppress(TLSRemoteAlert):
                peer.shake_hands()
                peer.echo(b"x")
                return "none"
            return "an alert"
        except (TLSError, ConnectionError):
            return "a close"
        finally:
            peer.close()

    assert await run(talk) != "none"
    await place.honest(version)


# ---- behind the handshake


@VERSIONS
async def test_records_at_and_above_the_limit(place: Place, version: tuple[int, int]) -> None:
    def talk() -> tuple[bytes, str]:
        peer = place.peer(version)
        try:
            peer.shake_hands()
            peer.put(DATA, b"y" * 2**14)
            got = bytes(peer.tls.read(max=2**14, min=2**14))
            peer.put(DATA, b"y" * (2**14 + 1))
            return got, peer.alert()
        finally:
            peer.close()

    assert await run(talk) == (b"y" * 2**14, "record_overflow")
    await place.honest(version)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("times", [1, 2, 20])
async def test_key_updates(place: Place, asks: bool, times: int) -> None:
    kind = KeyUpdateMessageType.update_requested if asks else KeyUpdateMessageType.update_not_requested

    def talk() -> bytes:
        peer = place.peer(TLS_1_3)
        try:
            peer.shake_hands()
            got = peer.echo(b"before")
            for _ in range(times):
                for _ in peer.tls.send_keyupdate_request(kind):
                    pass
            return got + peer.echo(b"behind")
        finally:
            peer.close()

    assert await run(talk) == b"beforebehind"


@pytest.mark.parametrize(
    ("kind", "content", "alert"),
    [
        (ALERT, b"", "unexpected_message"),
        (HANDSHAKE, b"", "unexpected_message"),
        (ALERT, b"\2", "decode_error"),
        (ALERT, b"\2\50\0", "decode_error"),
        (CHANGE_CIPHER_SPEC + 80, b"x", "unexpected_message"),
        (HANDSHAKE, b"\x18\0\0\1\2", "illegal_parameter"),
        (HANDSHAKE, b"\x14\0\0\1\2", "unexpected_message"),
    ],
)
async def test_odd_records_behind_the_handshake(place: Place, kind: int, content: bytes, alert: str) -> None:
    def talk() -> str:
        peer = place.peer(TLS_1_3)
        try:
            peer.shake_hands()
            assert peer.echo(b"x") == b"x"
            peer.put(kind, content)
            return peer.alert()
        finally:
            peer.close()

    assert await run(talk) == alert
    await place.honest(TLS_1_3)


async def test_padded_records(place: Place) -> None:
    """Padding of any length that the limit leaves, also around the handshake."""

    def talk(padding: int) -> bytes:
        peer = place.peer(TLS_1_3)
        peer.tls._recordLayer.padding_cb = lambda length, kind, room: min(padding, room)
        try:
            peer.shake_hands()
            return peer.echo(b"x" * 100)
        finally:
            peer.close()

    for padding in (1, 17, 1000, 2**14):
        assert await run(lambda padding=padding: talk(padding)) == b"x" * 100  # type: ignore[misc]  # a default binds it
