"""What is authentic is answered; an address is the same in both its spellings; answers fit; links and shares are heeded."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from gose.server import GridService
from secfunet.card.parameters import TLS_1_2, TLS_1_3
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.eap_tls import EapTlsMessage
from secfunet.radius.wire import MIN_MTU, Attribute, Code
from tests.gose.grid import TestGrid, new_grid
from tests.gose_racs.node import settle
from tests.gose_radius.peer import (
    RadiusClient,
    eapol_test,
    engine_of,
    metric,
    port_of,
    serve_radius,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

IDENTITY = EapPacket(EapCode.RESPONSE, 7, EapType.IDENTITY, b"x").encode()
EAP, PROXY, STATE = Attribute.EAP_MESSAGE.value, Attribute.PROXY_STATE.value, Attribute.STATE.value
NASES = tuple(f"127.0.0.{number}" for number in range(1, 6))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="rad-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(folder: Path) -> AsyncIterator[TestGrid]:
    """Two server cards, a VM whose session needs a login, and several access points."""
    async with new_grid(folder, servers=2) as grid:
        serve_radius(grid, "127.0.0.0/8", "::1/128")
        grid.hypervisor("hv-a")
        yield grid


@contextlib.asynccontextmanager
async def client_of(grid: TestGrid, **how: str) -> AsyncIterator[RadiusClient]:
    client = await RadiusClient.connect(port_of(grid), **how)  # type: ignore[arg-type]  # a secret is bytes
    try:
        yield client
    finally:
        client.close()


# --- an answer to whatever is authentic


async def test_status_server(grid: TestGrid) -> None:
    async with grid.running() as service, client_of(grid) as client:
        for proxies in ([], [(PROXY, b"one"), (PROXY, b"two")]):
            answer = await client.ask_raw(Code.STATUS_SERVER, [(32, b"a proxy"), *proxies])
            assert (answer.code, answer.eap, answer.state) == (Code.ACCESS_ACCEPT, b"", None)
            assert Attribute.EAP_MESSAGE not in answer.packet
            assert Attribute.VENDOR_SPECIFIC not in answer.packet
        assert metric(service, "gose_radius_packets_total", outcome="status") == 2
        assert metric(service, "gose_radius_packets_total", outcome="access_accept") == 0
        # Without a right signature it is worth nothing.
        raw = bytearray(client.request(IDENTITY, signed=False)[1])
        raw[0] = Code.STATUS_SERVER
        client.send(bytes(raw))
        assert await client.nothing()


ANSWERED = {
    "MAC authentication bypass": ([(1, b"020000000001"), (2, bytes(16)), (6, (10).to_bytes(4))], b""),
    "nothing at all": ([], b""),
    "CHAP": ([(1, b"x"), (3, bytes(17)), (60, bytes(16))], b""),
    "two States": ([(STATE, bytes(16)), (STATE, bytes(16)), (EAP, IDENTITY)], b""),
    "an EAP packet of 3250 bytes": ([(EAP, bytes(250))] * 13, b""),
    "an EAP request": ([(EAP, b"\1\7\0\5\1")], b""),
    "an EAP packet cut short": ([(EAP, IDENTITY[:-1])], b""),
    "an EAP packet of one byte": ([(EAP, b"\2")], b""),
    "an unknown EAP code": ([(EAP, b"\x09\7\0\5\1")], b""),
    "TLS before an identity": ([(EAP, b"\2\7\0\6\x0d\0")], b""),
    "an attribute of length 0": ([(EAP, IDENTITY)], b"\x01\x00"),
    "an attribute of length 1": ([(EAP, IDENTITY)], b"\x01\x01"),
    "an attribute that is too long": ([(EAP, IDENTITY)], b"\x01\xff"),
    "half an attribute": ([(EAP, IDENTITY)], b"\x01"),
    "vendors' attributes that are too short": ([(26, b""), (26, b"\0\0\1")], b""),
    "thirteen Proxy-States": ([(PROXY, bytes(253))] * 13, b""),
}


@pytest.mark.parametrize("what", ANSWERED)
async def test_what_is_authentic_and_unfit_is_rejected(grid: TestGrid, what: str) -> None:
    attributes, rest = ANSWERED[what]
    async with grid.running() as service, client_of(grid) as client:
        answer = await client.ask_raw(Code.ACCESS_REQUEST, attributes, rest)
        assert answer.code == Code.ACCESS_REJECT
        if answer.eap:
            eap = b"".join(value for kind, value in attributes if kind == EAP)
            assert EapPacket.decode(answer.eap) == EapPacket(EapCode.FAILURE, eap[1])
        assert metric(service, "gose_radius_dialogues") == 0


async def test_a_code_that_has_no_meaning_here_is_discarded(grid: TestGrid) -> None:
    """RFC 2865, 3: silently."""
    async with grid.running(), client_of(grid) as client:
        for code in (2, 3, 4, 11, 40, 255):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.ask_raw(code, [(EAP, IDENTITY)])


@pytest.mark.parametrize("unfit", [b"\2", b"\1\7\0\5\1", b"\2\x99\0\6\x0d\0", b"\2\x99\0\5\1", b"\2\7\0\x20\x0d\0"])
async def test_an_unfit_packet_does_not_end_an_authentication(grid: TestGrid, unfit: bytes) -> None:
    """Before the card and with it: the same is asked for again, and the peer's right answer still succeeds."""
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running(), client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        while answer.code == Code.ACCESS_CHALLENGE:
            again = await client.ask(unfit, answer.state)
            assert (again.code, again.eap, again.state) == (answer.code, answer.eap, answer.state)
            assert again.packet[Attribute.ERROR_CAUSE.value] == [(202).to_bytes(4)]
            answer = await client.ask(peer.process(answer.eap), answer.state)
        assert answer.code == Code.ACCESS_ACCEPT


async def test_unfit_packets_give_a_peer_no_more_time(grid: TestGrid) -> None:
    async with grid.running(peer_patience=0.6) as service, client_of(grid) as client:
        begun = await client.begin()
        until = time.monotonic() + 5
        while (await client.ask(b"\2", begun.state)).code == Code.ACCESS_CHALLENGE:
            assert time.monotonic() < until
            await asyncio.sleep(0.1)
        assert metric(service, "gose_radius_dialogues") == 0


async def test_a_repetition_under_another_number_gets_the_answer_of_the_first(grid: TestGrid) -> None:
    """A NAS that gave up waiting, or a proxy: neither a second question to the card, nor silence."""
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running(), client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        while answer.code == Code.ACCESS_CHALLENGE:
            eap = peer.process(answer.eap)
            requests = [client.request(eap, answer.state) for _ in range(3)]
            for _, raw in requests:
                client.send(raw)
            by_number = {packet.id: packet for packet, _ in requests}
            arrived = [await asyncio.wait_for(client.arrived.get(), 10) for _ in requests]
            answers = []
            for raw in arrived:
                client.arrived.put_nowait(raw)
                answers.append(await client.receive(by_number[raw[1]]))
            assert len({(one.code, one.eap) for one in answers}) == 1
            answer = answers[0]
        assert answer.code == Code.ACCESS_ACCEPT


# --- sizes


@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 14, 15])
@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
async def test_no_answer_has_more_than_4096_bytes(grid: TestGrid, count: int, version: int) -> None:
    """``receive`` looks at each. With up to 14 Proxy-States a smaller fragment helps; with more there is no room: rejected."""
    peer = engine_of(grid, grid.hypervisor("hv-a"), min_version=version, max_version=version, resume=False)
    proxies = [(PROXY, bytes(253))] * count

    def request(eap: bytes, state: bytes | None = None) -> list[tuple[int, bytes]]:
        chunks = [(EAP, eap[at : at + 253]) for at in range(0, len(eap), 253)]
        return chunks + proxies + ([] if state is None else [(STATE, state)])

    async with grid.running(), client_of(grid) as client:
        first = peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode())
        answer = await client.ask_raw(Code.ACCESS_REQUEST, request(first))
        sizes = []
        while answer.code == Code.ACCESS_CHALLENGE:
            sizes.append(len(answer.eap))
            eap = peer.process(answer.eap)
            # A peer's own long flight has to fit, too.
            sent = request(eap, answer.state)
            if sum(2 + len(value) for _, value in sent) > 4000:
                break
            answer = await client.ask_raw(Code.ACCESS_REQUEST, sent)
        assert len(sizes) > 1 or count > 14
        if count < 12:
            assert answer.code == Code.ACCESS_ACCEPT


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
async def test_peers_with_different_links_at_the_same_cards(grid: TestGrid, version: int) -> None:
    """Each gets packets as long as its own Framed-MTU allows, and as the card's setting where it has none."""
    limits = {None: 1010, 64: MIN_MTU, 0: MIN_MTU, 200: 200, 600: 600, 1500: 1010}

    async def one(mtu: int | None) -> tuple[int, list[int]]:
        peer = engine_of(grid, grid.hypervisor("hv-a"), min_version=version, max_version=version, resume=False)
        lengths: list[int] = []
        async with client_of(grid) as client:
            return (await client.authenticate(peer, mtu=mtu, lengths=lengths)).code, lengths

    async with grid.running():
        outcomes = await asyncio.gather(*(one(mtu) for mtu in [*limits, *limits]))
    for (mtu, limit), (code, lengths) in zip([*limits.items()] * 2, outcomes, strict=True):
        assert code == Code.ACCESS_ACCEPT, mtu
        assert limit - 8 <= max(lengths) <= limit or (limit == 1010 and 600 < max(lengths) <= limit), (mtu, lengths)


async def test_an_mtu_that_shrinks_under_way_is_not_exceeded(grid: TestGrid) -> None:
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running() as service, client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        answer = await client.ask(peer.process(answer.eap), answer.state)
        while answer.code == Code.ACCESS_CHALLENGE:
            answer = await client.ask(peer.process(answer.eap), answer.state, mtu=64)
            assert len(answer.eap) <= MIN_MTU
        assert metric(service, "gose_radius_dialogues") == 0


@pytest.mark.interop
@pytest.mark.parametrize("mtu", [64, 600, 1400])
async def test_framed_mtu_of_eapol_test(grid: TestGrid, mtu: int) -> None:
    async with grid.running():
        outcome = await eapol_test(
            grid, port_of(grid), grid.hypervisor("hv-a"), tls13=True, arguments=(f"-N12:d:{mtu}",)
        )
    assert outcome.is_success, outcome.text[-3000:]
    lengths = re.findall(r"decapsulated EAP packet \(code=1 id=\d+ len=(\d+)\)", outcome.text)
    assert 0 < max(map(int, lengths)) <= mtu


# --- addresses


async def test_an_ipv4_client_of_a_dual_stack_door(grid: TestGrid, caplog: pytest.LogCaptureFixture) -> None:
    before = grid.settings
    caplog.set_level("INFO")
    try:
        serve_radius(grid, "127.0.0.0/8", "::1/128", host="::")
        async with grid.running() as service:
            for host in ("127.0.0.1", "::1"):
                caplog.clear()
                async with client_of(grid, host=host) as client:
                    answer = await client.authenticate(engine_of(grid, grid.hypervisor("hv-a")))
                    assert answer.code == Code.ACCESS_ACCEPT
                (line,) = [one for one in caplog.records if one.getMessage() == "a peer is authenticated"]
                assert line.__dict__["nas"] == host
            assert metric(service, "gose_radius_packets_total", outcome="unknown_client") == 0
            async with client_of(grid, host="127.0.0.1") as client:
                client.secret = b"another secret, which is wrong."
                client.send(client.request(IDENTITY)[1])
                assert await client.nothing()
            (line,) = [one for one in caplog.records if one.getMessage() == "packets discarded"]
            assert line.__dict__["client"] == "127.0.0.1"
        serve_radius(grid, "::ffff:127.0.0.0/104")
        async with grid.running(), client_of(grid) as client:
            assert (await client.begin()).code == Code.ACCESS_CHALLENGE
    finally:
        grid.settings = before


# --- shares


async def slow_station(grid: TestGrid, address: str) -> None:
    """Behind an honest access point: begins, shows a ClientHello, and says no more; again and again."""
    async with client_of(grid, local=address) as client:
        while True:
            peer = engine_of(grid, grid.hypervisor("hv-a"))
            with contextlib.suppress(TimeoutError, AssertionError):
                answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
                if answer.code == Code.ACCESS_CHALLENGE:
                    await client.ask(peer.process(answer.eap), answer.state)
            await asyncio.sleep(0.05)


async def dripping_station(grid: TestGrid, address: str) -> None:
    """Never silent for long: a ClientHello in the smallest pieces, each one late."""
    async with client_of(grid, local=address) as client:
        while True:
            peer = engine_of(grid, grid.hypervisor("hv-a"))
            with contextlib.suppress(TimeoutError, AssertionError):
                answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
                if answer.code == Code.ACCESS_CHALLENGE:
                    hello = EapTlsMessage.decode(EapPacket.decode(peer.process(answer.eap)).data).data
                    for at in range(0, len(hello), 4):
                        piece = EapTlsMessage(hello[at : at + 4], more=True, total_length=None if at else len(hello))
                        number = EapPacket.decode(answer.eap).identifier
                        eap = EapPacket(EapCode.RESPONSE, number, EapType.TLS, piece.encode()).encode()
                        answer = await client.ask(eap, answer.state)
                        if answer.code != Code.ACCESS_CHALLENGE:
                            break
                        await asyncio.sleep(0.2)
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def slow_stations(
    grid: TestGrid, service: GridService, addresses: list[str], *, drip: bool = False
) -> AsyncIterator[None]:
    station = dripping_station if drip else slow_station
    tasks = [asyncio.create_task(station(grid, one)) for one in addresses]
    try:
        await settle(lambda: metric(service, "gose_radius_dialogues") >= len(addresses) / 2)
        await asyncio.sleep(0.3)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def logins(grid: TestGrid, count: int) -> list[float]:
    """How long each of so many logins took."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        await grid.session("vm-1", "hv-a")
        took.append(time.monotonic() - began)
    return took


async def test_stations_that_hold_all_they_can_leave_logins_their_time(grid: TestGrid) -> None:
    async with grid.running(sessions_per_vm=64) as service:
        quiet = sorted(await logins(grid, 5))
        stations = [NASES[number % 4] for number in range(24)]
        async with slow_stations(grid, service, stations):
            crowded = sorted(await logins(grid, 5))
        assert crowded[2] < 5 * quiet[2] + 0.2, (quiet, crowded)
        assert crowded[-1] < 3, "less than the patience for one silent peer"


async def test_another_access_points_peer_gets_in_beside_them(grid: TestGrid) -> None:
    async with (
        grid.running() as service,
        client_of(grid, local=NASES[4]) as client,
        slow_stations(grid, service, [NASES[0]] * 16),
    ):
        for _ in range(3):
            began = time.monotonic()
            answer = await client.authenticate(engine_of(grid, grid.hypervisor("hv-a"), resume=False))
            assert answer.code == Code.ACCESS_ACCEPT
            assert time.monotonic() - began < 4, "less than the patience for one silent peer"


async def test_names_of_one_access_point_do_not_take_every_place(grid: TestGrid) -> None:
    async with (
        grid.running(handshakes=8) as service,
        client_of(grid, local=NASES[0]) as crowd,
        client_of(grid, local=NASES[1]) as other,
    ):
        for _ in range(8):
            assert (await crowd.begin()).code == Code.ACCESS_CHALLENGE
        assert (await crowd.begin()).code == Code.ACCESS_REJECT
        answers = [await other.begin() for _ in range(5)]
        assert [one.code for one in answers[:4]] == [Code.ACCESS_CHALLENGE] * 4
        assert answers[4].code == Code.ACCESS_REJECT, "as many as the other has left"
        assert metric(service, "gose_radius_dialogues") == 8
        assert (await other.authenticate(engine_of(grid, grid.hypervisor("hv-a")))).code == Code.ACCESS_REJECT


async def test_logins_of_strangers_leave_radius_a_card(grid: TestGrid) -> None:
    """The other way round: connections to the login door that say hello and no more."""
    async with grid.running() as service, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(service.rack.logins.lease(timeout=1))]
        waiting = [
            asyncio.create_task(stack.enter_async_context(service.rack.logins.lease(timeout=3))) for _ in range(8)
        ]
        async with client_of(grid) as client:
            began = time.monotonic()
            assert (await client.authenticate(engine_of(grid, grid.hypervisor("hv-a")))).code == Code.ACCESS_ACCEPT
            assert time.monotonic() - began < 2
        assert held
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_single_card_is_given_to_a_login_while_its_peer_is_silent(folder: Path) -> None:
    home = folder / "single"
    home.mkdir()
    async with new_grid(home, servers=1) as grid:
        serve_radius(grid, "127.0.0.0/8")
        async with grid.running(sessions_per_vm=64) as service:
            for drip in (False, True):
                async with slow_stations(grid, service, list(NASES[:3]), drip=drip):
                    assert max(await logins(grid, 2)) < 3, "less than the patience for one silent peer"
            async with client_of(grid) as client:
                peer = engine_of(grid, grid.hypervisor("hv-a"))
                assert (await client.authenticate(peer)).code == Code.ACCESS_ACCEPT
