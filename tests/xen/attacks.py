"""What somebody with root in a guest tries, as programs that run there with the agent's own libraries."""

from __future__ import annotations

import json
from typing import Any

from testbed.guests import Guest

PYTHON = "/usr/lib/secfunet/vm-agent/bin/python3"

OPEN_VCHAN = """
import asyncio, json, sys
from secfunet.xen.errors import XenError
from secfunet.xen.vchan import Vchan
async def main():
    try:
        channel = await Vchan.connect(0, sys.argv[1])
    except XenError as error:
        print(json.dumps({"refused": str(error), "errno": error.errno}))
    else:
        print(json.dumps({"opened": True}))
        await channel.close()
asyncio.run(main())
"""

MAP_GRANTS = """
import ctypes, json, sys
from secfunet.xen.libraries import load
gnttab = load("xengnttab", "libxengnttab1")
gnttab.xengnttab_open.restype = gnttab.xengnttab_map_grant_ref.restype = ctypes.c_void_p
gnttab.xengnttab_open.argtypes = [ctypes.c_void_p, ctypes.c_uint]
gnttab.xengnttab_map_grant_ref.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int]
handle = gnttab.xengnttab_open(None, 0)
assert handle
first, last = int(sys.argv[1]), int(sys.argv[2])
mapped = [number for number in range(first, last) if gnttab.xengnttab_map_grant_ref(handle, 0, number, 3)]
print(json.dumps({"tried": last - first, "mapped": mapped}))
"""

READ_XENSTORE = """
import json, sys
from secfunet.xen.errors import XenError
from secfunet.xen.xenstore import Xenstore
answers = {}
with Xenstore() as xenstore:
    for path in sys.argv[1:]:
        try:
            value = xenstore.read(path)
            answers[path] = None if value is None else len(value)
        except XenError as error:
            answers[path] = {"errno": error.errno}
print(json.dumps(answers))
"""

CALL_WITH = """
import base64, json, os, sys
import grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from vm_agent.enrolment import Enrolment, channel_options
enrolment = Enrolment.from_json(sys.stdin.buffer.read())
target = sys.argv[1]
with grpc.secure_channel(target, enrolment.credentials(), channel_options(enrolment.server_name, target)) as channel:
    stub = agent_pb2_grpc.AgentServiceStub(channel)
    sign = operation_pb2.SignOperation(scheme=operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256, digest=os.urandom(32))
    try:
        answer = stub.Sign(agent_pb2.SignRequest(request_id=os.urandom(16), sign=sign), timeout=float(sys.argv[2]))
        print(json.dumps({"container": len(answer.results.container)}))
    except grpc.RpcError as error:
        print(json.dumps({"code": error.code().name, "details": error.details()}))
"""

ENROL_WITH = """
import asyncio, json, sys, time
from pathlib import Path
from vm_agent.enrolment import enrol
from vm_agent.errors import AgentError
from vm_agent.join import parse_join
join = parse_join(sys.stdin.buffer.read(), Path("/run"))
try:
    asyncio.run(enrol(join, target=sys.argv[1], now=time.time(), timeout=60))
    print(json.dumps({"enrolled": True}))
except AgentError as error:
    print(json.dumps({"refused": str(error), "reason": error.reason}))
"""


def attack(guest: Guest, program: str, *arguments: str, data: bytes = b"", timeout: float = 300) -> dict[str, Any]:
    """What the attack came to, as the program tells it. TestbedError if it did not run to its end."""
    guest.run("cat >/run/attack.py", data=program.encode())
    said = guest.run(f"{PYTHON} /run/attack.py {' '.join(arguments)}", data=data, timeout=timeout)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer
