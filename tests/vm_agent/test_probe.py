"""``vm-agent status`` tells the truth: it asks along the whole chain, and says which link is broken."""

from __future__ import annotations

import asyncio

import pytest

from secfunet.agent.v1 import local_pb2
from secfunet.rpc.facts import Facts
from secfunet.rpc.reasons import Domain, Reason
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import MiddlewareDouble
from tests.vm_agent.test_service import running
from vm_agent.options import AgentOptions
from vm_agent.server import AgentService

PROBE = local_pb2.GetStatusRequest(probe=True)


async def probed(service: AgentService) -> local_pb2.GetStatusResponse:
    await asyncio.sleep(1.05)  # an answer stands for a second
    return await service.probed(5)


@pytest.mark.parametrize(
    ("domain", "reason", "link"),
    [
        (Domain.GRID, Reason.CARD_UNAVAILABLE, "the VM's card"),
        (Domain.MIDDLEWARE, Reason.GRID_UNAVAILABLE, "the grid"),
        (Domain.MIDDLEWARE, Reason.HYPERVISOR_CARD_REFUSED, "the hypervisor's card"),
        (Domain.GRID, Reason.TOKEN_REFUSED, "the token"),
        (Domain.MIDDLEWARE, Reason.DOMAIN_NOT_RUNNING, "dom0"),
    ],
)
async def test_the_link_that_is_broken_is_named(
    middleware: MiddlewareDouble, options: AgentOptions, domain: Domain, reason: Reason, link: str
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        assert (await stub.GetStatus(PROBE, timeout=5)).works
        middleware.broken = Facts.of(domain, reason)
        found = await probed(service)
        assert (found.works, found.broken_link, found.reason) == (False, link, reason)
        assert found.problem
        # What dom0 alone can say is as it was.
        assert found.enrolled
        assert found.connected
        middleware.broken = None
        assert (await probed(service)).works


@pytest.mark.parametrize(("offset", "how"), [(-180, "seconds ahead of"), (7200, "seconds behind")])
async def test_a_clock_that_makes_every_answer_invalid(
    middleware: MiddlewareDouble, options: AgentOptions, offset: float, how: str
) -> None:
    middleware.clock_offset = offset
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
        found = await probed(service)
        assert (found.works, found.broken_link) == (False, "the clock")
        assert how in found.problem


async def test_a_middleware_that_is_away_and_an_agent_that_never_enrolled(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
        await middleware.stop()
        found = await probed(service)
        assert (found.works, found.broken_link) == (False, "dom0")
    middleware.join_json.unlink(missing_ok=True)


async def test_callers_share_one_look(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        await asyncio.gather(*(stub.GetStatus(PROBE, timeout=5) for _ in range(50)))
        assert middleware.probes == 1
        assert not (await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=5)).works  # it was not asked
        assert middleware.probes == 1
