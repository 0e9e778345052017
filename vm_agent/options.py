"""What the daemon was told, already validated (``settings``). Plain: the daemon stays for months and does without what validates.

``vm-agent serve`` validates the settings and then becomes the daemon, which gets them as JSON in its environment; there is no secret in
them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ENVIRONMENT = "VM_AGENT_OPTIONS"
MAX_UNIX_PATH = 107  # bytes; sockaddr_un(7), less the terminating zero

XENSTORE = "xenstore"
"""In the place of the join information's path: dom0 hands it over through xenstore."""

ProfileName = Literal["oaep-pss-sha256", "pkcs1-v1_5"]


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """See ``settings.Limits``."""

    connections: int
    waiting: int
    streams: int
    per_stream: int
    batch: int
    batches_in_flight: int
    default_timeout: float
    max_timeout: float
    answer_age: float


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """See ``settings.AgentSettings``. Paths are absolute."""

    join: Path | str
    state: Path
    socket: Path
    group: str | None
    container_profile: ProfileName
    log_level: str
    metrics_port: int | None
    limits: LimitOptions

    def to_json(self) -> str:
        """For the daemon's environment."""
        return json.dumps(asdict(self), default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> AgentOptions:
        """What ``to_json`` gave; anything else is a ValueError, TypeError or KeyError: a fault of whoever starts the daemon."""
        values = json.loads(text)
        values.update({name: Path(values[name]) for name in ("state", "socket")})
        if values["join"] != XENSTORE:
            values["join"] = Path(values["join"])
        return cls(**{**values, "limits": LimitOptions(**values["limits"])})
