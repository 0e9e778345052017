"""Settings of ``vm-agent serve``: one TOML file, relative paths in it are relative to its folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from secfunet.service.settings import FilePath, Settings, SettingsError, load_settings
from vm_agent.options import MAX_UNIX_PATH, AgentOptions, LimitOptions, ProfileName

DEFAULT_CONFIG = Path("/etc/secfunet/vm-agent.toml")
DEFAULT_SOCKET = Path("/run/secfunet/agent.sock")


def _short_enough(path: Path) -> Path:
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ValueError(f"a Unix socket's path has at most {MAX_UNIX_PATH} bytes: {path}")
    return path


SocketPath = Annotated[FilePath, AfterValidator(_short_enough)]


class Limits(Settings):
    """What local programs may ask of the agent at once. Times in seconds."""

    connections: int = Field(default=64, ge=1, le=4096, description="open connections of local programs")
    waiting: int = Field(default=1024, ge=1, le=65536, description="operations that wait for an answer")
    streams: int = Field(default=8, ge=1, le=64, description="open streams of operations, of one user")
    per_stream: int = Field(default=256, ge=1, le=4096, description="operations of one stream that wait for an answer")
    batch: int = Field(default=64, ge=1, le=64, description="operations in one batch to the middleware")
    batches_in_flight: int = Field(default=2, ge=1, le=4, description="batches sent and not yet answered")
    default_timeout: float = Field(default=20.0, gt=0, le=60, description="for a caller that sets no deadline")
    max_timeout: float = Field(default=60.0, gt=0, le=300, description="for a caller that sets a longer deadline")
    answer_age: float = Field(default=60.0, gt=0, le=600, description="how old an answer may be, by this VM's clock")


class AgentSettings(Settings):
    """The whole file. Every key has a default: an empty file serves a VM whose join information lies beside it."""

    join: Annotated[Literal["xenstore"] | FilePath, Field(union_mode="left_to_right")] = Field(
        default=Path("join.json"),
        description="file with what dom0 handed to this domain, removed once it is used; or the word xenstore",
    )
    state: FilePath = Field(default=Path("state"), description="folder (0700) of the agent's own key and certificate")
    socket: SocketPath = Field(default=Path("agent.sock"), description="Unix socket for the programs of this VM")
    group: str | None = Field(
        default=None, max_length=64, description="group that may open the socket; none: only the agent's own user"
    )
    container_profile: ProfileName = "oaep-pss-sha256"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Prometheus metrics on 127.0.0.1; none: off"
    )
    limits: Limits = Limits()

    def options(self) -> AgentOptions:
        """For the daemon."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "limits"}
        return AgentOptions(limits=LimitOptions(**self.limits.model_dump()), **values)


def main() -> int:
    """For a daemon that reads its settings again: validates the file, and writes what it says for the daemon to standard output."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_CONFIG
    try:
        options = load_settings(AgentSettings, path).options()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 78
    sys.stdout.write(options.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
