"""The process behind ``vm-agent serve``: as little in memory as it needs. Takes the path of the settings."""

from __future__ import annotations

import sys
from pathlib import Path

from secfunet.errors import SecFuNetError
from secfunet.service.daemon import run_daemon
from secfunet.service.logs import configure_logs
from secfunet.service.settings import SettingsError, load_settings
from vm_agent.local_socket import DoorError
from vm_agent.server import AgentService
from vm_agent.settings import AgentSettings

EX_FAILED, EX_USAGE, EX_CONFIG = 1, 2, 78  # as secfunet.service.cli.ExitCode, which comes with all of typer


def main(arguments: list[str]) -> int:
    """Runs the agent until SIGTERM; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m vm_agent.daemon SETTINGS\n")
        return EX_USAGE
    try:
        settings = load_settings(AgentSettings, Path(arguments[0]))
        configure_logs(settings.log_level)

        async def make() -> AgentService:
            return AgentService(settings)

        run_daemon(make)
    except SecFuNetError as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_CONFIG if isinstance(error, (SettingsError, DoorError)) else EX_FAILED
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
