"""What attackers run in a guest works where it may: a refusal there is the other end's, and no fault of the program."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

from cryptography import x509

from secfunet.identity import der_of, pem_of
from secfunet.middleware.v1 import orchestrator_pb2
from tests.dom0_middleware.world import Guest, World, pem_key
from tests.xen.attacks import CALL_WITH, ENROL_WITH


async def run(program: str, *arguments: str, data: bytes) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    said, _ = await process.communicate(data)
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(said)
    return answer


def kept(guest: Guest) -> bytes:
    """As its agent keeps it."""
    authority = der_of(x509.load_pem_x509_certificate(guest.authority))
    return json.dumps(
        {
            "uuid": guest.uuid,
            "key": pem_key(guest.key).decode(),
            "certificate": pem_of(guest.certificate).decode(),
            "guest_authority": base64.b64encode(authority).decode(),
            "agent": guest.join["agent"],
            "server_name": guest.join["server_name"],
            "join_digest": "",
        }
    ).encode()


async def test_enrol_with(world: World) -> None:
    guest = await world.boot(await world.create())
    join = json.dumps(guest.join).encode()
    assert await run(ENROL_WITH, guest.join["enrol"], data=join) == {"enrolled": True}
    answer = await run(ENROL_WITH, guest.join["enrol"], data=join)  # with another key
    assert "refused the join secret" in answer["refused"]


async def test_call_with(world: World) -> None:
    guest = await world.enrolled()
    answer = await run(CALL_WITH, guest.join["agent"], "10", data=kept(guest))
    assert answer["container"] > 256
    async with world.orchestrator() as stub:
        await stub.StopVm(orchestrator_pb2.StopVmRequest(uuid=guest.uuid, force=True), timeout=10)
    again = await world.boot(guest.uuid)
    answer = await run(CALL_WITH, again.join["agent"], "10", data=kept(guest))
    assert answer["code"] == "UNAUTHENTICATED"
