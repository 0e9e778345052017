"""A hypervisor that signs for its VMs without pause, as a process: it stands where the grid is. One JSON object a line says how it goes.

``python -m tests.gose_racs.signer GOSE.TOML VM...``; it ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio

from gose.authority import AuthorityFolder
from gose.settings import GoseSettings
from secfunet.identity import Role
from secfunet.operation import check_result
from secfunet.service.settings import load_settings
from tests.gose.grid import TestGrid, sign_operation
from tests.gose.test_operations import check_signature, execute, reason_of, under

HYPERVISOR = "hv-a"
PAUSE = 0.05  # seconds


def say(**entry: Any) -> None:
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()


async def sign_for(grid: TestGrid, vm: str) -> None:
    """Each signature is checked before it counts."""
    session = await grid.session(vm, HYPERVISOR)
    hvid = grid.hypervisor(HYPERVISOR).hvid
    async with grid.channel(HYPERVISOR) as channel:
        stub = grid.stub(channel)
        while True:
            operation = sign_operation()
            say(vm=vm, event="asks")
            began = time.monotonic()
            reason = ""
            try:
                answer = await stub.Execute(execute(operation), timeout=20, metadata=under(session))
            except grpc.aio.AioRpcError as error:
                reason = reason_of(error)
            else:
                results = grid.open(HYPERVISOR, answer.containers[0])
                vmid = grid.vms[vm].thumbprint
                output = check_result(results, operation=operation, vmid=vmid, hvid=hvid, now=time.time())
                check_signature(grid, vm, operation.sign.digest, output)
            say(vm=vm, event="failed" if reason else "signed", reason=reason, took=time.monotonic() - began)
            await asyncio.sleep(PAUSE)


async def main(config: Path, vms: list[str]) -> None:
    settings = load_settings(GoseSettings, config)
    grid = TestGrid(config.parent, settings, AuthorityFolder(settings.authority), {}, {})
    with grid.registry() as registry:
        grid.vms.update({vm: registry.named(Role.VM, vm) for vm in vms})
    signing = [asyncio.create_task(sign_for(grid, vm)) for vm in vms]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    done, _ = await asyncio.wait([*signing, ended], return_when=asyncio.FIRST_COMPLETED)
    for task in signing:
        task.cancel()
    for task in done:
        task.result()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
