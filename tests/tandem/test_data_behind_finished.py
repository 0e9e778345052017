"""A running listener, and clients of the standard library whose first data is in the same segment as their Finished."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secfunet.tandem.aio import TandemServer, start_tandem_server
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from tests.tandem.conftest import Cards, Pools
from tests.tandem.recut import Identities, MemoryPeer
from tests.tandem.test_both_ends import Echo, only, port_of

SIZES = {
    36: ([100], [264], [264, 36], [72, 36], [76, 36], [36, 36], [264, 37], [30, 264, 36], [264, 1, 36], [5000, 78, 36]),
    52: ([264, 52], [78, 52], [52, 52], [110, 52], [60_000, 78, 52], [1] * 40),
}
"""Data of each record: some as long as a CertificateVerify, or a Finished of either hash, and then a Finished."""


@contextlib.asynccontextmanager
async def listening_card(pools: Pools, version: int, suite: int) -> AsyncIterator[TandemServer]:
    async with await start_tandem_server(
        Echo, pools.server(), host="127.0.0.1", parameters=only(version, suites=(suite,))
    ) as listener:
        yield listener


async def talk(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None, sizes: list[int]) -> MemoryPeer:
    """One connection: the last flight and a record for each size leave in one segment, and come back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        peer = MemoryPeer(context, "client", session)
        out = peer.step()
        while not peer.is_through:
            writer.write(out)
            received = await reader.read(65536)
            assert received, "the listener closed"
            out = peer.step(received)
        writer.write(out + b"".join(peer.send(b"a" * size) for size in sizes))
        got = b""
        async with asyncio.timeout(10):
            while len(got) < sum(sizes):
                received = await reader.read(65536)
                assert received, "the listener closed"
                got += peer.read(received)
        assert got == b"A" * sum(sizes)
        return peer
    finally:
        writer.close()


@pytest.mark.parametrize("kind", ["p256", "rsa2048", "rsa4096"])
@pytest.mark.parametrize(("suite", "finished"), [(0x1301, 36), (0x1302, 52)], ids=["SHA-256", "SHA-384"])
async def test_data_in_the_segment_of_the_finished(
    cards: Cards, pools: Pools, tmp_path: Path, suite: int, finished: int, kind: str
) -> None:
    context = Identities(tmp_path, cards.authority, kinds=(kind,)).context("client", kind)
    async with listening_card(pools, TLS_1_3, suite) as listener:
        session = None
        for index, sizes in enumerate(SIZES[finished]):
            peer = await talk(context, port_of(listener), session, sizes)
            assert peer.tls.session_reused == bool(index)
            session = peer.tls.session
            await talk(context, port_of(listener), None, sizes)
        assert listener.handshakes_failed == 0


async def test_data_behind_the_finished_of_tls12(cards: Cards, pools: Pools, tmp_path: Path) -> None:
    context = Identities(tmp_path, cards.authority, kinds=("p256",)).context("client", "p256")
    async with listening_card(pools, TLS_1_2, 0xC02B) as listener:
        session = None
        for sizes in SIZES[36]:
            session = (await talk(context, port_of(listener), session, sizes)).tls.session
        assert listener.handshakes_failed == 0
