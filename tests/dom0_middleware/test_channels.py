"""Channels through Xen, as far as they go without Xen: who comes to a domain's port, and the tables that say so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0_middleware.channels import door, xenstore_join
from dom0_middleware.channels.door import attach
from dom0_middleware.channels.folder import FolderChannel
from dom0_middleware.channels.interfaces import (
    BridgeFacts,
    objection,
    parse_forwarding,
    parse_neighbours,
)
from dom0_middleware.channels.iproute import FactsUnavailable
from dom0_middleware.channels.port import ChannelDomain, ChannelError, JoinInformation
from dom0_middleware.channels.tcp import TcpChannel

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
ADDRESS = "127.0.0.1"
MAC, OTHER_MAC = "00:16:3e:00:00:01", "00:16:3e:00:00:02"
OWN = BridgeFacts({"vif3.0": MAC}, frozenset({MAC}), {MAC: frozenset({"vif3.0"})})


def facts(
    interfaces: Mapping[str, str] = OWN.interfaces,
    neighbours: frozenset[str] = OWN.neighbours,
    forwarding: Mapping[str, frozenset[str]] = OWN.forwarding,
) -> BridgeFacts:
    return BridgeFacts(interfaces, neighbours, forwarding)


def test_the_domain_itself_is_welcome() -> None:
    assert objection(ADDRESS, ADDRESS, OWN) == ""
    assert objection("fd00::1", "FD00:0::1", OWN) == ""


@pytest.mark.parametrize(
    ("source", "seen", "why"),
    [
        pytest.param("127.0.0.2", OWN, "it comes from", id="another address"),
        pytest.param("", OWN, "no address", id="no source"),
        pytest.param(ADDRESS, facts(interfaces={}), "no interface", id="a domain without interfaces"),
        pytest.param(ADDRESS, facts(neighbours=frozenset()), "0 neighbours", id="nobody answers for it"),
        pytest.param(ADDRESS, facts(neighbours=frozenset({MAC, OTHER_MAC})), "2 neighbours", id="two answer for it"),
        pytest.param(
            ADDRESS, facts(neighbours=frozenset({OTHER_MAC})), "none of the domain's", id="a neighbour took it"
        ),
        pytest.param(ADDRESS, facts(forwarding={}), "no interface", id="never seen at the bridge"),
        pytest.param(
            ADDRESS,
            facts(forwarding={MAC: frozenset({"vif4.0"})}),
            "vif4.0",
            id="a neighbour took the MAC address, too",
        ),
        pytest.param(
            ADDRESS, facts(forwarding={MAC: frozenset({"vif3.0", "vif4.0"})}), "vif4.0", id="seen at two interfaces"
        ),
    ],
)
def test_whoever_is_not_the_domain_is_refused(source: str, seen: BridgeFacts, why: str) -> None:
    assert why in objection(source, ADDRESS, seen)


def test_tables_as_iproute2_prints_them() -> None:
    neighbours = [
        {"dst": "192.168.77.21", "lladdr": MAC.upper(), "state": ["REACHABLE"]},
        {"dst": "x", "state": ["FAILED"]},
    ]
    assert parse_neighbours(json.dumps(neighbours).encode()) == {MAC}
    forwarding = [
        {"mac": MAC, "ifname": "vif3.0", "flags": [], "master": "xenbr0", "state": ""},
        {"mac": "fe:ff:ff:ff:ff:ff", "ifname": "vif3.0", "vlan": 1, "state": "permanent"},
    ]
    assert parse_forwarding(json.dumps(forwarding).encode()) == {MAC: frozenset({"vif3.0"})}
    assert parse_neighbours(b"") == frozenset()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["mac", "ifname", "lladdr", "state"]), inner)
    ),
    max_leaves=10,
)


@given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_table_is_parsed_or_refused(untrusted: bytes) -> None:
    for parse in (parse_neighbours, parse_forwarding):
        with contextlib.suppress(FactsUnavailable):
            parse(untrusted)


class Bridge:
    """What the hypervisor says now, and who was refused."""

    def __init__(self) -> None:
        self.facts: BridgeFacts | None = OWN
        self.refused: list[tuple[str, str]] = []

    async def read(self, _domain_id: int, _source: str, _bridge: str) -> BridgeFacts:
        if self.facts is None:
            raise FactsUnavailable("not now")
        return self.facts


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def channel(folder: Path, bridge: Bridge) -> AsyncIterator[tuple[TcpChannel, int]]:
    tcp = TcpChannel(
        folder,
        address=ADDRESS,
        bridge="xenbr0",
        ports=range(21000, 29000),
        refused=lambda uuid, why: bridge.refused.append((uuid, why)),
        facts=bridge.read,
        check_interval=0.05,
        facts_age=0.0,
    )
    addresses = await tcp.open(ChannelDomain(UUID, 3, ADDRESS))

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(echo, addresses.agent.removeprefix("unix:"))
    try:
        yield tcp, int(addresses.guest_agent.rpartition(":")[2])
    finally:
        server.close()
        await tcp.stop()


async def answer(port: int) -> bytes:
    reader, writer = await asyncio.open_connection(ADDRESS, port)
    try:
        writer.write(b"hello")
        async with asyncio.timeout(5):
            return await reader.read(5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_the_domain_is_relayed_and_a_neighbour_is_not(folder: Path) -> None:
    bridge = Bridge()
    async with channel(folder, bridge) as (_, port):
        assert await answer(port) == b"hello"
        assert not bridge.refused
        bridge.facts = facts(neighbours=frozenset({OTHER_MAC}))
        assert await answer(port) == b""
        assert bridge.refused[0][0] == UUID
        assert OTHER_MAC in bridge.refused[0][1]


async def test_whoever_cannot_be_checked_is_refused(folder: Path) -> None:
    bridge = Bridge()
    async with channel(folder, bridge) as (_, port):
        bridge.facts = None
        assert await answer(port) == b""
        assert bridge.refused == [(UUID, "not now")]


async def test_a_connection_ends_when_its_address_moves(folder: Path) -> None:
    bridge = Bridge()
    async with channel(folder, bridge) as (_, port):
        reader, writer = await asyncio.open_connection(ADDRESS, port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        bridge.facts = facts(forwarding={MAC: frozenset({"vif4.0"})})
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        assert "while it was open" in bridge.refused[0][1]
        writer.close()


async def test_ports_are_the_same_after_a_restart(folder: Path) -> None:
    bridge = Bridge()
    async with channel(folder, bridge) as (tcp, port):
        await tcp.stop()
        addresses = await tcp.reopen(ChannelDomain(UUID, 3, ADDRESS))
        assert addresses.guest_agent == f"tcp:{ADDRESS}:{port}"


async def test_a_stranger_is_gone_before_anything_is_asked(folder: Path) -> None:
    """By its address alone; beside as many of them as come, the domain is served."""
    bridge = Bridge()
    looks = 0
    read = bridge.read

    async def count(domain_id: int, source: str, name: str) -> BridgeFacts:
        nonlocal looks
        looks += 1
        return await read(domain_id, source, name)

    bridge.read = count  # type: ignore[method-assign]
    async with channel(folder, bridge) as (tcp, port):
        for _ in range(40):
            with contextlib.suppress(ConnectionError):  # as soon as it was made, or while it is
                reader, writer = await asyncio.open_connection(ADDRESS, port, local_addr=("127.0.0.2", 0))
                async with asyncio.timeout(5):
                    assert await reader.read() == b""
                writer.close()
        assert looks == 0
        assert len(bridge.refused) == 40
        assert await answer(port) == b"hello"
        assert tcp.status(UUID).state in ("open", "waiting")


@pytest.mark.parametrize(("own", "other"), [("127.0.0.1", "127.0.0.2"), ("::1", "::2")])
async def test_the_kernel_drops_strangers_once_there_are_many(own: str, other: str) -> None:
    """``entitled`` is one address; the filter lets it pass and no other."""
    for entitled, passes in ((own, True), (other, False)):
        with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET) as listener:
            listener.bind((own, 0))
            listener.listen()
            attach(listener, ip_address(entitled))
            with socket.socket(listener.family) as client:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect((own, listener.getsockname()[1]))
                await asyncio.sleep(0.1)
                listener.setblocking(False)
                try:
                    listener.accept()[0].close()
                    came = True
                except BlockingIOError:
                    came = False
        assert came is passes


async def test_one_that_floods_its_own_port_is_served_at_a_rate(folder: Path) -> None:
    bridge = Bridge()
    async with channel(folder, bridge) as (_, port):
        clients = [socket.socket() for _ in range(300)]
        for client in clients:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect((ADDRESS, port))
        await asyncio.sleep(0.3)
        assert len(bridge.refused) < 100
        assert {why for _, why in bridge.refused} == {"it has too many connections"}
        for client in clients:
            client.close()


async def test_a_folders_sockets_are_served_at_a_rate_and_lead_to_others(folder: Path) -> None:
    """A guest that connects for ever, to the sockets that it was handed."""
    made = FolderChannel(folder)
    addresses = await made.open(ChannelDomain(UUID, None))
    behind = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal behind
        behind += 1
        writer.write(await reader.read(5))
        writer.close()

    server = await asyncio.start_unix_server(serve, addresses.agent.removeprefix("unix:"))
    assert not Path(addresses.agent.removeprefix("unix:")).is_relative_to(made.folder(UUID))
    outside = addresses.guest_agent.removeprefix("unix:")
    reader, writer = await asyncio.open_unix_connection(outside)
    writer.write(b"hello")
    assert await reader.read() == b"hello"
    writer.close()
    begin = asyncio.get_running_loop().time()
    for _ in range(500):
        with socket.socket(socket.AF_UNIX) as one:
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(outside)
        await asyncio.sleep(0.001)
    took = asyncio.get_running_loop().time() - begin
    assert behind <= door.AT_ONCE + door.PER_SECOND * took + 2
    await made.close(UUID)
    assert not os.listdir(folder)  # noqa: PTH208
    server.close()


async def test_a_domain_without_an_address_has_no_tcp_channel(folder: Path) -> None:
    tcp = TcpChannel(
        folder,
        address=ADDRESS,
        bridge="xenbr0",
        ports=range(21000, 29000),
        refused=lambda *_: None,
        facts=Bridge().read,
    )
    with pytest.raises(ChannelError, match="address"):
        await tcp.open(ChannelDomain(UUID, 3))
    with pytest.raises(ChannelError):
        await tcp.open(ChannelDomain(UUID, None, ADDRESS))


@pytest.mark.parametrize("gives_up", [False, True])
async def test_an_invitation_is_not_erased_for_an_enrolment_before_it(
    monkeypatch: pytest.MonkeyPatch, gives_up: bool
) -> None:
    """Each is a thread of its own, and xenstored may let one of them wait."""
    may_remove, there = threading.Event(), set[str]()

    class Tree:
        def __enter__(self) -> Tree:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, path: str, value: bytes, *, readers: object) -> None:
            there.add(path)

        def remove(self, path: str) -> None:
            may_remove.wait(10)
            there.discard(path)

    monkeypatch.setattr(xenstore_join, "Xenstore", Tree)
    join = xenstore_join.XenstoreJoin()
    join.domain(UUID, 7)
    erased = asyncio.ensure_future(join.erase(UUID))
    await asyncio.sleep(0.01)
    if gives_up:
        erased.cancel()
    invited = asyncio.ensure_future(join.hand_over(JoinInformation(UUID, "secret", "", "", "", "")))
    await asyncio.sleep(0.05)
    may_remove.set()
    await asyncio.gather(erased, invited, return_exceptions=True)
    assert len(there) == 1
