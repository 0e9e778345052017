"""TLS-Tandem on both ends: a client card and a server card, over loopback TCP."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest

from secfunet.card import CardGoneError, Segmentation, SingleCard
from secfunet.tandem.aio import close_writer, open_tandem_connection, start_tandem_server
from secfunet.tandem.errors import HandshakeRefusedError, HandshakeTimeoutError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.errors import PeerAlertError, ServerNameError, TruncatedStreamError, UnsupportedSuiteError
from tests.support.cards import personalise, running_card
from tests.tandem.conftest import Pools

VERSIONS = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["tls12", "tls13"])

PART_OF_A_HELLO = bytes.fromhex("16030100050100010003")  # a whole record


class Echo(asyncio.Protocol):
    """Sends everything back in capitals."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())


def only(version: int, **more: object) -> TandemParameters:
    return TandemParameters(min_version=version, max_version=version, **more)  # type: ignore[arg-type]


async def talk(pools_client, port: int, parameters: TandemParameters, text: bytes = b"hello") -> dict[str, object]:
    reader, writer = await open_tandem_connection(
        pools_client, "127.0.0.1", port, server_name="localhost", parameters=parameters, timeout=10
    )
    try:
        writer.write(text)
        assert await reader.readexactly(len(text)) == text.upper()
        names = ("cipher", "tls_version", "alpn", "resumed", "peercert")
        return {name: writer.get_extra_info(name) for name in names}
    finally:
        await close_writer(writer)


async def read_all(pool, port: int, parameters: TandemParameters) -> bytes:
    """Connect and read to the end: in TLS 1.3 a client is done before the server has seen its certificate."""
    reader, writer = await open_tandem_connection(
        pool, "127.0.0.1", port, server_name="localhost", parameters=parameters, timeout=5
    )
    try:
        return await reader.read()
    finally:
        await close_writer(writer)


def port_of(server) -> int:
    return int(server.sockets[0].getsockname()[1])


@VERSIONS
@pytest.mark.parametrize("client", ["rsa", "ec"])
@pytest.mark.parametrize("server", ["rsa", "ec"])
async def test_full_then_resumed(pools: Pools, version: int, client: str, server: str) -> None:
    parameters = only(version, alpn=("h2", "http/1.1"))
    client_pool = pools.client(client)
    seen: list[bytes] = []

    class Seeing(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            seen.append(transport.get_extra_info("peercert"))

    async with await start_tandem_server(
        Seeing, pools.server(server), host="127.0.0.1", parameters=parameters
    ) as listener:
        results = [await talk(client_pool, port_of(listener), parameters) for _ in range(3)]
        assert listener.handshakes_done == 3
    assert [result["resumed"] for result in results] == [False, True, True]
    for result in results:
        assert result["tls_version"] == version
        assert result["alpn"] == "h2"
        assert result["peercert"] == pools.cards.certificates[f"server-{server}"]
    assert seen == [pools.cards.certificates[f"client-{client}"]] * 3


# The cards have no finite-field groups; the records of those suites are tested without a handshake.
SUITES_OF_CARDS = sorted(number for number, suite in SUITES.items() if "_DHE_" not in suite.name)


@pytest.mark.parametrize("number", SUITES_OF_CARDS, ids=lambda number: SUITES[number].name)
async def test_every_suite(pools: Pools, number: int) -> None:
    suite = SUITES[number]
    parameters = only(suite.version, suites=(number,), allow_legacy=suite.is_legacy)
    kind = "ec" if "ECDSA" in suite.name else "rsa"
    async with await start_tandem_server(Echo, pools.server(kind), host="127.0.0.1", parameters=parameters) as listener:
        result = await talk(pools.client("ec"), port_of(listener), parameters, b"x" * 100_000)
    assert result["cipher"] == suite.name


@VERSIONS
async def test_cards_that_know_short_apdus_only(pools: Pools, version: int) -> None:
    short = Segmentation.DRAFT
    parameters = only(version)
    async with await start_tandem_server(
        Echo, pools.server("rsa", segmentation=short), host="127.0.0.1", parameters=parameters
    ) as listener:
        results = [await talk(pools.client("rsa", segmentation=short), port_of(listener), parameters) for _ in range(2)]
    assert [result["resumed"] for result in results] == [False, True]


@VERSIONS
async def test_no_resumption_where_it_is_not_wanted(pools: Pools, version: int) -> None:
    parameters = only(version, resume=False)
    client_pool = pools.client()
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", parameters=parameters) as listener:
        results = [await talk(client_pool, port_of(listener), parameters) for _ in range(2)]
    assert [result["resumed"] for result in results] == [False, False]


@VERSIONS
async def test_a_foreign_client_is_refused(pools: Pools, version: int) -> None:
    parameters = only(version)
    made = []

    def factory() -> Echo:
        made.append(1)
        return Echo()

    async with await start_tandem_server(factory, pools.server(), host="127.0.0.1", parameters=parameters) as listener:
        with pytest.raises(PeerAlertError, match="unknown_ca"):
            await read_all(pools.client("foreign"), port_of(listener), parameters)
        await asyncio.sleep(0.1)
        assert listener.handshakes_failed == 1
    assert not made


async def test_another_servers_name_is_refused(pools: Pools) -> None:
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as listener:
        with pytest.raises(ServerNameError):
            await open_tandem_connection(
                pools.client(), "127.0.0.1", port_of(listener), server_name="elsewhere.example", timeout=5
            )


async def test_the_hosts_own_check_may_refuse(pools: Pools) -> None:
    class NotYouError(Exception):
        pass

    def refuse(certificates: tuple[bytes, ...]) -> None:
        assert certificates[0] == pools.cards.certificates["client-ec"]
        raise NotYouError

    parameters = TandemParameters(verify_peer=refuse)
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", parameters=parameters) as listener:
        reader, writer = await open_tandem_connection(
            pools.client(), "127.0.0.1", port_of(listener), server_name="localhost", timeout=5
        )
        with pytest.raises(PeerAlertError, match="access_denied"):
            await reader.read()
        await close_writer(writer)


async def test_versions_that_do_not_meet(pools: Pools) -> None:
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", parameters=only(TLS_1_3)) as listener:
        with pytest.raises(PeerAlertError, match="protocol_version"):
            await open_tandem_connection(
                pools.client(),
                "127.0.0.1",
                port_of(listener),
                server_name="localhost",
                parameters=only(TLS_1_2),
                timeout=5,
            )


async def test_legacy_suites_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(UnsupportedSuiteError):
        TandemParameters(suites=(0x002F,))


async def test_a_silent_server_and_a_silent_client_run_into_the_deadline(pools: Pools) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    with pytest.raises(HandshakeTimeoutError):
        await open_tandem_connection(
            pools.client(), "127.0.0.1", server.sockets[0].getsockname()[1], server_name="localhost", timeout=0.3
        )
    server.close()
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", handshake_timeout=0.3) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        assert await asyncio.wait_for(reader.read(), 5) == b"", "nothing is said to who says nothing"
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        writer.write(PART_OF_A_HELLO)
        alert = await asyncio.wait_for(reader.read(), 5)
        assert alert[0] == 21
        writer.close()
        # A card was never asked: the listener still serves.
        assert (await talk(pools.client(), port_of(listener), TandemParameters()))["tls_version"] == TLS_1_3


async def test_too_many_handshakes_at_once(pools: Pools) -> None:
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", max_handshakes=2) as listener:
        idle = [await asyncio.open_connection("127.0.0.1", port_of(listener)) for _ in range(2)]
        for _, each in idle:
            each.write(PART_OF_A_HELLO)
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        writer.write(PART_OF_A_HELLO)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        assert listener.handshakes_refused == 1
        for _, each in [*idle, (reader, writer)]:
            each.close()


async def test_garbage_in_place_of_a_hello(pools: Pools) -> None:
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer[:1] == b"\x15"
        writer.close()
    assert listener.handshakes_failed == 1


async def test_a_server_that_hangs_up_in_the_handshake(pools: Pools) -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(rude, "127.0.0.1", 0)
    with pytest.raises((TruncatedStreamError, ConnectionResetError)):
        await open_tandem_connection(
            pools.client(), "127.0.0.1", server.sockets[0].getsockname()[1], server_name="localhost", timeout=5
        )
    server.close()


async def test_a_server_of_another_authority_is_refused(pools: Pools, files) -> None:
    certificate, key = files.leaf(is_foreign=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)
    for version in (TLS_1_2, TLS_1_3):
        with pytest.raises(HandshakeRefusedError):
            await open_tandem_connection(
                pools.client(),
                "127.0.0.1",
                server.sockets[0].getsockname()[1],
                server_name="localhost",
                parameters=only(version),
                timeout=5,
            )
    server.close()


async def test_an_address_in_place_of_a_name(pools: Pools) -> None:
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as listener:
        _, writer = await open_tandem_connection(
            pools.client(), "127.0.0.1", port_of(listener), server_name="127.0.0.1", timeout=5
        )
        await close_writer(writer)
        with pytest.raises(ServerNameError):
            await open_tandem_connection(
                pools.client(), "127.0.0.1", port_of(listener), server_name="127.0.0.2", timeout=5
            )


@pytest.mark.e2e
async def test_a_card_that_dies_is_said_to_be_gone_and_may_come_back(pools: Pools, tmp_path: Path) -> None:
    async with (
        running_card(tmp_path) as card,
        await start_tandem_server(Echo, pools.server(), host="127.0.0.1") as listener,
    ):
        await personalise(card, pools.cards.authority, "mortal", server=False)
        pool = SingleCard(lambda: card.connect("mortal"))
        reader, writer = await open_tandem_connection(
            pool, "127.0.0.1", port_of(listener), server_name="localhost", timeout=5
        )
        await card.kill()
        with pytest.raises(CardGoneError):
            await open_tandem_connection(pool, "127.0.0.1", port_of(listener), server_name="localhost", timeout=5)
        # A connection that has its keys needs no card any more.
        writer.write(b"alive")
        assert await reader.readexactly(5) == b"ALIVE"
        await close_writer(writer)
        await card.start()
        assert (await talk(pool, port_of(listener), TandemParameters()))["tls_version"] == TLS_1_3
        await pool.close()
