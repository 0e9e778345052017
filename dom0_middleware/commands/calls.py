"""Calls of a command to the running daemon, as an orchestrator."""

from __future__ import annotations

import asyncio
import uuid as uuids
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dom0_middleware.orchestrator_client import orchestrator_stub
from dom0_middleware.settings import MiddlewareSettings
from secfunet.errors import SecFuNetError
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.service.settings import load_settings

if TYPE_CHECKING:
    from secfunet.middleware.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub as Stub

Answer = TypeVar("Answer")


class UnknownVm(SecFuNetError):
    """No VM of that name or UUID."""

    def __init__(self, vm: str) -> None:
        super().__init__(f"there is no VM '{vm}'")
        self.vm = vm


class AmbiguousVm(SecFuNetError):
    """It is the UUID of one VM, and the name of another."""

    def __init__(self, vm: str) -> None:
        super().__init__(f"'{vm}' is the UUID of one VM and the name of another: name the other one by its own UUID")
        self.vm = vm


def call_daemon(config: Path, orchestrator: str, act: Callable[[Stub], Awaitable[Answer]]) -> Answer:
    """What ``act`` got from the daemon of these settings. Raises what ``orchestrator_stub`` raises."""
    settings = load_settings(MiddlewareSettings, config)

    async def call() -> Answer:
        async with orchestrator_stub(settings, orchestrator) as stub:
            return await act(stub)

    return asyncio.run(call())


def call_for_vm(
    vm: str, config: Path, orchestrator: str, timeout: float, act: Callable[[Stub, str], Awaitable[Answer]]
) -> Answer:
    """``call_daemon`` with the UUID of the VM that was named. Raises UnknownVm, too."""

    async def call(stub: Stub) -> Answer:
        return await act(stub, await _uuid(stub, vm, timeout))

    return call_daemon(config, orchestrator, call)


async def _uuid(stub: Stub, vm: str, timeout: float) -> str:
    """A VM's UUID, by its UUID (first) or its name. Raises UnknownVm, AmbiguousVm."""
    vms = (await stub.ListVms(pb.ListVmsRequest(), timeout=timeout)).vms
    named = [found.uuid for found in vms if found.name == vm]
    try:
        wanted = str(uuids.UUID(vm))
    except ValueError:
        pass
    else:
        if any(found.uuid == wanted for found in vms):
            # Such names are not given any more; there may be one from before.
            if named and named != [wanted]:
                raise AmbiguousVm(vm)
            return wanted
    if not named:
        raise UnknownVm(vm)
    return named[0]
