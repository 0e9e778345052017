"""FreeRADIUS as a proxy in front of the grid: what it carries, who is refused through it, and that the grid stays in service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from gose.server import GridService
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.identity import Role
from secfunet.radius.wire import Code
from tests.gose.grid import TestGrid, new_grid
from tests.gose_racs.node import settle
from tests.gose_radius.peer import RadiusClient, eapol_test, metric, port_of, serve_radius
from tests.gose_radius.proxy import running_proxy
from tests.interop_radius.freeradius import FreeRadius

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.interop]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="rad-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(folder: Path) -> AsyncIterator[TestGrid]:
    # One server card: a session is resumed where it was made.
    async with new_grid(folder, vms=(), servers=1) as grid:
        serve_radius(grid)
        grid.hypervisor("hv-a")
        yield grid


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(grid: TestGrid) -> AsyncIterator[GridService]:
    async with grid.running() as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(grid: TestGrid, service: GridService) -> AsyncIterator[FreeRadius]:
    async with running_proxy(grid.folder, port_of(grid)) as proxy:
        yield proxy


def is_in_service(proxy: FreeRadius) -> bool:
    return not any(word in proxy.text for word in ("as zombie", "as dead", "No response to status check"))


@pytest.mark.parametrize("tls13", [False, True])
async def test_in_full_and_resumed(grid: TestGrid, proxy: FreeRadius, tls13: bool) -> None:
    outcome = await eapol_test(grid, proxy.port, grid.hypervisor("hv-a"), tls13=tls13, again=2)
    assert outcome.is_success, outcome.text[-3000:]
    assert set(outcome.versions) == {"TLSv1.3" if tls13 else "TLSv1.2"}
    assert outcome.resumed[-1] == "1"
    assert outcome.keys == (3, 0)
    assert is_in_service(proxy)


@pytest.mark.parametrize("tls13", [False, True])
async def test_a_revoked_identity_is_refused(grid: TestGrid, proxy: FreeRadius, tls13: bool) -> None:
    peer = grid.hypervisor(f"hv-{tls13}")
    assert (await eapol_test(grid, proxy.port, peer, tls13=tls13)).is_success
    with grid.registry() as registry:
        registry.revoke_identity(Role.HYPERVISOR, peer.name)
    outcome = await eapol_test(grid, proxy.port, peer, tls13=tls13)
    assert outcome.code != 0
    assert "FAILURE" in outcome.text
    assert is_in_service(proxy)


async def test_a_request_without_eap_does_not_take_the_grid_out_of_service(
    grid: TestGrid, service: GridService, proxy: FreeRadius
) -> None:
    """MAC authentication bypass of a switch: rejected at once. Then peers get in as before."""
    switch = await RadiusClient.connect(proxy.port)
    try:
        for _ in range(3):
            answer = await switch.ask_raw(
                Code.ACCESS_REQUEST, [(1, b"020000000001"), (2, bytes(16)), (6, (10).to_bytes(4))]
            )
            assert answer.code == Code.ACCESS_REJECT
    finally:
        switch.close()
    assert metric(service, "gose_radius_packets_total", outcome="access_reject") >= 3
    assert is_in_service(proxy)
    assert (await eapol_test(grid, proxy.port, grid.hypervisor("hv-a"))).is_success


@pytest.mark.peers
@pytest.mark.timeout(120)
async def test_a_grid_that_was_away_is_in_service_again(folder: Path) -> None:
    """A request that nobody answers makes the proxy doubt; its status checks find the grid there again, without anybody's help."""
    home = folder / "away"
    home.mkdir()
    async with new_grid(home, vms=(), servers=1) as grid:
        serve_radius(grid)
        async with running_proxy(home, port_of(grid)) as proxy:
            access_point = await RadiusClient.connect(proxy.port)
            access_point.send(access_point.request(EapPacket(EapCode.RESPONSE, 7, EapType.IDENTITY, b"x").encode())[1])
            await settle(lambda: not is_in_service(proxy), timeout=30)
            access_point.close()
            async with grid.running() as service:
                await settle(lambda: metric(service, "gose_radius_packets_total", outcome="status") >= 1, timeout=60)
                await settle(lambda: "alive" in proxy.text, timeout=60)
                outcome = await eapol_test(grid, proxy.port, grid.hypervisor("hv-a"))
                assert outcome.is_success
