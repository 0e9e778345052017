"""What somebody with root in a guest tries: the modules beside this one are programs that run there, with the agent's own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from testbed.guests import Guest

PYTHON = "/usr/lib/secfunet/vm-agent/bin/python3"


def program(name: str) -> str:
    """The text of one."""
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


OPEN_VCHAN, MAP_GRANTS, READ_XENSTORE = program("open_vchan"), program("map_grants"), program("read_xenstore")
CALL_WITH, ENROL_WITH = program("call_with"), program("enrol_with")
SPOOF_BRIDGE, KNOCK = program("spoof_bridge"), program("knock")
FLOOD_VCHAN = program("flood_vchan")


def attack(guest: Guest, program: str, *arguments: str, data: bytes = b"", timeout: float = 300) -> dict[str, Any]:
    """What the attack came to, as the program tells it. TestbedError if it did not run to its end."""
    guest.run("cat >/run/attack.py", data=program.encode())
    said = guest.run(f"{PYTHON} /run/attack.py {' '.join(arguments)}", data=data, timeout=timeout)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer
