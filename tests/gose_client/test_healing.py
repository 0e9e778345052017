"""What breaks heals within the caller's time; what waiting does not heal is said at once."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gose_client import (
    DeadlineError,
    GoseClient,
    GridRefusedError,
    GridUntrustedError,
    HypervisorCardError,
    ProtocolViolationError,
    VmSession,
)
from secfunet.card import CardOpener, CardPort, SingleCard, connect_unix
from tests.gose.grid import free_ports, sign_operation
from tests.gose_client.conftest import Host
from tests.support.pki import CertificateAuthority

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


async def sign(host: Host, client: GoseClient, session: VmSession, *, timeout: float = 20.0) -> None:
    """One signature, out of its container."""
    operation = sign_operation()
    answer = await session.execute([operation], timeout=timeout)
    assert not answer.failures, answer.failures
    (result,) = (await host.open(client, session, answer.containers[0])).results
    assert result.request_id == operation.request_id


async def test_a_restarted_grid_goes_on_with_the_same_session(host: Host) -> None:
    async with host.client() as client:
        async with host.grid.running():
            session = await host.session(client)
            secret = session._grant.secret
            await sign(host, client, session)
        waiting = asyncio.create_task(sign(host, client, session))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        async with host.grid.running():
            await waiting
            assert session._grant.secret == secret, "the grid knew the session still: no new login"


async def test_a_session_can_be_opened_while_the_grid_is_still_starting(host: Host) -> None:
    async with host.client() as client:
        opening = asyncio.create_task(host.session(client))
        await asyncio.sleep(0.4)
        async with host.grid.running():
            await sign(host, client, await opening)


async def test_a_grid_that_forgot_the_session_is_logged_in_at_again_once(host: Host) -> None:
    async with host.client() as client:
        async with host.grid.running():
            session = await host.session(client)
            await sign(host, client, session)
        for path in host.grid.settings.state.glob("service.sqlite*"):
            path.unlink()
        async with host.grid.running() as service:
            await asyncio.gather(*(sign(host, client, session) for _ in range(12)))
            assert service.metrics.sessions_granted._value.get() == 1
            assert session._generation == 1


async def test_a_session_that_ended_is_replaced(host: Host) -> None:
    async with host.grid.running(session_lifetime=1.0) as service, host.client() as client:
        session = await host.session(client)
        await sign(host, client, session)
        await asyncio.sleep(1.2)
        await asyncio.gather(*(sign(host, client, session) for _ in range(8)))
        assert service.metrics.sessions_granted._value.get() == 2


async def test_a_connection_that_is_cut_again_and_again_loses_nothing(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        stop = asyncio.Event()
        cuts = 0

        async def cut() -> None:
            nonlocal cuts
            while not stop.is_set():
                await asyncio.sleep(0.25)
                relay = client._channel._relay
                assert relay is not None
                for task in list(relay._tasks):
                    task.cancel()
                    cuts += 1

        async def work() -> None:
            for _ in range(8):
                await sign(host, client, session, timeout=30)
                await asyncio.sleep(0.05)

        cutting = asyncio.create_task(cut())
        await asyncio.gather(*(work() for _ in range(6)))
        stop.set()
        await cutting
        assert cuts >= 2
        assert session._generation == 0, "a lost connection needs no login"


async def test_a_killed_vm_card_comes_back_within_the_callers_time(host: Host) -> None:
    card = host.grid.cards["se-vm-2"]
    async with host.grid.running(), host.client() as client:
        session = await host.session(client, "vm-2")
        assert not (await session.execute([sign_operation()], timeout=10)).failures
        await card.kill()
        waiting = asyncio.create_task(session.execute([sign_operation()], timeout=30))
        await asyncio.sleep(0.3)
        await card.start()
        answer = await waiting
        assert not answer.failures, answer.failures


async def test_a_card_that_stays_away_is_told_as_what_it_is(host: Host) -> None:
    card = host.grid.cards["se-vm-2"]
    async with host.grid.running(), host.client() as client:
        session = await host.session(client, "vm-2")
        await card.kill()
        try:
            (failure,) = (await session.execute([sign_operation()], timeout=3)).failures
            assert failure.reason == "CARD_UNAVAILABLE"
        finally:
            await card.start()


async def test_the_callers_time_is_kept_when_nobody_is_there(host: Host) -> None:
    async with host.client() as client:
        begun = time.monotonic()
        with pytest.raises(DeadlineError) as late:
            await host.session(client, timeout=1.0)
        assert time.monotonic() - begun < 1.5
        assert "cannot be reached" in str(late.value)
        assert late.value.code.name == "DEADLINE_EXCEEDED"


async def test_a_caller_that_gives_up_takes_nothing_from_the_others(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        await sign(host, client, session)
        stream = session._stream
        impatient = [asyncio.create_task(session.execute([sign_operation()], timeout=10)) for _ in range(20)]
        patient = [asyncio.create_task(sign(host, client, session)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in impatient:
            task.cancel()
        await asyncio.gather(*patient)
        assert session._stream is stream, "the stream was not lost"


async def test_a_revoked_token_ends_the_session_for_good(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        await sign(host, client, session)
        with host.grid.registry() as registry:
            token_id = service_token_id(host)
            registry.revoke_token(token_id)
        begun = time.monotonic()
        with pytest.raises(GridRefusedError) as refused:
            await session.execute([sign_operation()], timeout=10)
        assert refused.value.reason == "TOKEN_REFUSED"
        assert time.monotonic() - begun < 3


def service_token_id(host: Host) -> str:
    """The jti of the newest session of the running grid."""
    import sqlite3

    with sqlite3.connect(host.grid.settings.state / "service.sqlite") as database:
        (found,) = database.execute("SELECT token_id FROM sessions ORDER BY created_at DESC LIMIT 1").fetchone()
    return str(found)


async def test_a_wrong_pin_is_tried_once_and_never_again(host: Host) -> None:
    asked = 0

    async def connect() -> CardPort:
        nonlocal asked
        asked += 1
        return await connect_unix(host.card.socket, timeout=5)

    pool = SingleCard(CardOpener(connect, lambda: b"99999999"))
    async with host.grid.running(), GoseClient(host.settings(), pool) as client:
        for _ in range(3):
            with pytest.raises(HypervisorCardError, match="attempts left: 2"):
                await host.session(client, timeout=5)
    assert asked == 1
    good = await host.card.connect("hypervisor")  # verifies the right PIN: the counter is full again
    await good.close()


async def test_whoever_is_not_of_the_grids_ca_is_not_believed(host: Host, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(CertificateAuthority("Somebody else").pem)
    async with host.grid.running(), host.client(authority=other) as client:
        begun = time.monotonic()
        with pytest.raises(GridUntrustedError):
            await host.session(client, timeout=10)
        assert time.monotonic() - begun < 3


async def test_a_login_that_leads_elsewhere_is_not_followed(host: Host) -> None:
    (port,) = free_ports(1)
    visited: list[object] = []
    spy = await asyncio.start_server(lambda _, writer: visited.append(writer.close()), "127.0.0.1", port)
    async with spy, host.grid.running():
        for setting in ("openid_provider", "openid_login"):
            async with host.client(**{setting: f"https://localhost:{port}"}) as client:
                with pytest.raises(ProtocolViolationError, match="not configured"):
                    await host.session(client, timeout=10)
    assert not visited


def sockets_in(folder: Path) -> list[Path]:
    """The sockets in the client's private folder."""
    assert folder.stat().st_mode & 0o777 == 0o700
    return list(folder.iterdir())


@pytest.fixture
def relay_folder() -> Iterator[Path]:
    """A folder with a short name that the client makes by itself."""
    folder = Path(f"/tmp/gc-{secrets.token_hex(6)}")  # noqa: S108 - a random name
    yield folder
    folder.rmdir()


async def test_closing_the_client_leaves_no_socket_behind(host: Host, relay_folder: Path) -> None:
    async with host.grid.running(), host.client(relay_folder=relay_folder) as client:
        await host.session(client)
        assert len(sockets_in(relay_folder)) == 1
    assert not sockets_in(relay_folder)
