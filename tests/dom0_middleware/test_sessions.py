"""Sessions: one login a VM, however many ask; and an end that nothing outlives."""

from __future__ import annotations

import asyncio

import pytest

from dom0_middleware.errors import Reason, Refused, Unavailable
from dom0_middleware.sessions import VmSessions
from dom0_middleware.state import VmRecord
from gose_client.errors import GridUnavailableError
from secfunet.identity import thumbprint
from tests.dom0_middleware.world import GridDouble, certificate, sign_operation, token


def record(vm: str = "web") -> VmRecord:
    der = certificate(vm)
    return VmRecord(f"uuid-{vm}", vm, thumbprint(der), der, token(vm), 64, 1, False, 0.0)


async def test_callers_that_come_together_share_one_login() -> None:
    grid = GridDouble()
    sessions = VmSessions(grid)
    grid.login_gate.clear()
    tasks = [asyncio.create_task(sessions.session(record(), timeout=5)) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    grid.login_gate.set()
    found = await asyncio.gather(*tasks)
    assert grid.logins == 1
    assert len({id(session) for session in found}) == 1
    assert len(sessions) == 1
    await sessions.close()
    assert found[0].closed


async def test_a_login_that_failed_is_tried_again() -> None:
    grid = GridDouble()
    sessions = VmSessions(grid)
    grid.down = GridUnavailableError("away")
    with pytest.raises(GridUnavailableError):
        await sessions.session(record(), timeout=5)
    grid.down = None
    await sessions.session(record(), timeout=5)
    assert grid.logins == 2


async def test_a_caller_that_gives_up_does_not_take_the_others_with_it() -> None:
    grid = GridDouble()
    sessions = VmSessions(grid)
    grid.login_gate.clear()
    first = asyncio.create_task(sessions.session(record(), timeout=5))
    second = asyncio.create_task(sessions.session(record(), timeout=5))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    grid.login_gate.set()
    await second


async def test_the_deadline_holds() -> None:
    grid = GridDouble()
    sessions = VmSessions(grid)
    grid.login_gate.clear()
    with pytest.raises(Unavailable) as error:
        await sessions.session(record(), timeout=0.02)
    assert error.value.reason is Reason.DEADLINE_EXCEEDED


@pytest.mark.parametrize("where", ["login", "execute"])
async def test_an_end_reaches_what_is_in_flight(where: str) -> None:
    grid = GridDouble()
    sessions = VmSessions(grid)
    gate = grid.login_gate if where == "login" else grid.gate
    gate.clear()
    task = asyncio.create_task(sessions.execute(record(), [sign_operation()], timeout=5))
    await asyncio.sleep(0.01)
    sessions.end("uuid-web")
    with pytest.raises(Refused) as error:
        await asyncio.wait_for(task, 1)
    assert error.value.reason is Reason.SESSION_ENDED
    gate.set()
    await sessions.close()
    assert all(session.closed for session in grid.sessions)
    assert len(sessions) == 0


@pytest.mark.parametrize("where", ["login", "execute"])
async def test_an_end_reaches_what_is_in_flight_under_an_earlier_token(where: str) -> None:
    """The VM got another token, and lost its right before the last answer under the one before."""
    grid = GridDouble()
    sessions = VmSessions(grid)
    gate = grid.login_gate if where == "login" else grid.gate
    gate.clear()
    task = asyncio.create_task(sessions.execute(record(), [sign_operation()], timeout=5))
    await asyncio.sleep(0.01)
    sessions.renew("uuid-web")
    await asyncio.sleep(0.01)
    sessions.end("uuid-web")
    with pytest.raises(Refused) as error:
        await asyncio.wait_for(task, 1)
    assert error.value.reason is Reason.SESSION_ENDED
    gate.set()
    await sessions.close()
    assert all(session.closed for session in grid.sessions)


async def test_the_end_of_one_vm_is_not_that_of_another() -> None:
    grid = GridDouble()
    sessions = VmSessions(grid)
    for vm in ("web", "db"):
        await sessions.session(record(vm), timeout=5)
    sessions.end("uuid-web")
    await sessions.execute(record("db"), [sign_operation()], timeout=5)
    assert grid.logins == 2
    # A later run of the same VM begins anew.
    await sessions.execute(record("web"), [sign_operation()], timeout=5)
    assert grid.logins == 3


async def test_an_end_while_the_grid_ignores_the_cancellation() -> None:
    """A login that cannot be cancelled any more still leaves no session."""
    grid = GridDouble()
    sessions = VmSessions(grid)
    opened = grid.open_session

    async def stubborn(*arguments: object, **options: object) -> object:
        return await asyncio.shield(asyncio.ensure_future(opened(*arguments, **options)))  # type: ignore[arg-type]

    grid.open_session = stubborn  # type: ignore[method-assign, assignment]
    grid.login_gate.clear()
    task = asyncio.create_task(sessions.session(record(), timeout=5))
    await asyncio.sleep(0.01)
    sessions.end("uuid-web")
    grid.login_gate.set()
    with pytest.raises(Refused):
        await task
    assert sessions.current("uuid-web") is None
    assert "eyJ" not in repr(record())


async def test_an_end_in_the_same_turn_as_the_answer() -> None:
    """Whoever waits for a login hears that the session has ended, although the login's answer was there first."""
    grid = GridDouble()
    sessions = VmSessions(grid)
    grid.login_gate.clear()
    task = asyncio.create_task(sessions.session(record(), timeout=5))
    await asyncio.sleep(0.01)
    grid.login_gate.set()
    asyncio.get_running_loop().call_soon(sessions.end, "uuid-web")
    with pytest.raises(Refused) as error:
        await task
    assert error.value.reason is Reason.SESSION_ENDED
    await sessions.close()
    assert all(session.closed for session in grid.sessions)
