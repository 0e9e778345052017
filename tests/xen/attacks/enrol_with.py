"""Enrols at the target with the join information that comes on standard input, and a key of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from vm_agent.enrolment import EnrolmentAttempt, enrol
from vm_agent.errors import AgentError
from vm_agent.join import parse_join
from vm_agent.keys import AgentKey


async def main(join: bytes, target: str) -> dict[str, object]:
    attempt = EnrolmentAttempt(parse_join(join, Path("/run")), AgentKey.generate())
    try:
        await enrol(attempt, target=target, now=time.time(), timeout=60)
    except AgentError as error:
        return {"refused": str(error), "reason": error.reason}
    return {"enrolled": True}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.stdin.buffer.read(), sys.argv[1]))))
