"""What dom0 wrote down."""

from __future__ import annotations

import json
from typing import Any

from testbed import Host
from tests.xen.orchestrator import STATE


class Audit:
    """The audit log of a host, from a moment on: ``since`` is a number of a record."""

    def __init__(self, host: Host) -> None:
        self._host = host
        lines = host.get(f"{STATE}/audit.jsonl").splitlines()
        self._lines = len(lines)
        self.since = int(json.loads(lines[-1])["n"]) if lines else 0

    def records(self, action: str = "", **fields: str) -> list[dict[str, Any]]:
        """Records after ``since`` with this action and these fields."""
        found = []
        for line in self._host.get(f"{STATE}/audit.jsonl").splitlines():
            record: dict[str, Any] = json.loads(line)
            wanted = {**fields, **({"action": action} if action else {})}
            if record["n"] > self.since and all(record.get(name) == value for name, value in wanted.items()):
                found.append(record)
        return found

    def wait_for(self, action: str, *, then: str, timeout: float = 600) -> None:
        """A shell command on the host, as soon as this action was permitted. Raises TestbedError if it is not in time."""
        seen = (
            f"""tail -n +{self._lines + 1} {STATE}/audit.jsonl | grep '"action": *"{action}"' | grep -q '"permitted"'"""
        )
        self._host.run(f"until {seen}; do sleep 0.1; done; {then}", timeout=timeout)

    def is_sound(self) -> bool:
        """The command that checks the chain of its hashes is content."""
        verify = (
            "/opt/secfunet/current/bin/secure-middleware audit verify --config /etc/secfunet/secure-middleware.toml"
        )
        return self._host.run(verify, check=False).code == 0
