"""Would a login work now? What is away and what is wrong are told apart, and a wrong setting is named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gose_client import GoseClient, GoseClientError, GridRefusedError
from gose_client.trial import Link, LinkState
from secfunet.card import SingleCard
from tests.gose_client.conftest import Host
from tests.support.pki import CertificateAuthority

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]
ALL = ["card", "openid_provider", "service_provider", "operations", "openid_login", "login"]


async def broken(client: GoseClient) -> list[Link]:
    return [link for link in await client.look(timeout=10) if link.state is not LinkState.OK]


async def test_a_grid_that_serves(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        links = await client.look(timeout=10)
        assert [(link.name, link.state) for link in links] == [(name, LinkState.OK) for name in ALL]


async def test_a_grid_that_is_away_is_no_settings_fault(host: Host) -> None:
    async with host.client() as client:
        found = await broken(client)
        assert {link.name for link in found} == set(ALL[1:5])
        assert {link.state for link in found} == {LinkState.AWAY}


async def test_another_name_of_the_grid_than_its_own(host: Host) -> None:
    settings = host.settings()
    for key in ("openid_provider", "service_provider"):
        changed = getattr(settings, key).replace("localhost", "127.0.0.1")
        async with host.grid.running(), host.client(**{key: changed}) as client:
            (found,) = await broken(client)
            assert (found.name, found.state, found.setting) == ("login", LinkState.WRONG, f"grid.{key}")


async def test_another_grids_authority(host: Host, tmp_path: Path) -> None:
    other = tmp_path / "ca.pem"
    other.write_bytes(CertificateAuthority().pem)
    async with host.grid.running(), host.client(authority=other) as client:
        (found,) = await broken(client)
        assert (found.name, found.state, found.setting) == ("openid_provider", LinkState.WRONG, "grid.authority")


async def test_a_pin_that_is_wrong_and_a_card_that_is_away(host: Host, tmp_path: Path) -> None:
    from secfunet.apdu import PinError
    from secfunet.card import CardClient, CardGoneError

    for error, state, setting in (
        (PinError(0x63C2, 0x20, 2), LinkState.WRONG, "card"),
        (FileNotFoundError(2, "No such file or directory", "user.pin"), LinkState.WRONG, "card"),
        (CardGoneError("the card is gone"), LinkState.AWAY, ""),
    ):

        async def refuse(error: Exception = error) -> CardClient:
            raise error

        async with host.grid.running(), GoseClient(host.settings(), SingleCard(refuse)) as client:
            (found,) = await broken(client)
            assert (found.name, found.state, found.setting) == ("card", state, setting)


async def test_a_probe_of_a_session_reaches_the_vms_card(host: Host) -> None:
    async with host.client() as client:
        async with host.grid.running():
            session = await host.session(client)
            await client.card_lives(timeout=5)
            assert abs(await session.probe(timeout=10) - time.time()) < 60
        with pytest.raises(GoseClientError):
            await session.probe(timeout=2)
        # Another grid process does not know the session: one login heals it, as it would for an operation.
        async with host.grid.running():
            await session.probe(timeout=15)
            card = host.grid.cards["se-vm-1"]
            await card.kill()
            with pytest.raises(GridRefusedError) as refused:
                await session.probe(timeout=10)
            assert refused.value.reason == "CARD_UNAVAILABLE"
            await session.close()
