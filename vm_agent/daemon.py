"""The process behind ``vm-agent serve``: as little in memory as it needs."""

from __future__ import annotations

import os
import sys

from secfunet.errors import SecFuNetError
from secfunet.service.daemon import run_daemon
from secfunet.service.logs import configure_logs
from vm_agent.local_socket import DoorError
from vm_agent.options import ENVIRONMENT, AgentOptions
from vm_agent.server import AgentService

EX_FAILED, EX_USAGE, EX_CONFIG = 1, 2, 78  # as secfunet.service.cli.ExitCode, which comes with all of typer


def main() -> int:
    """Runs the agent until SIGTERM; returns the exit code."""
    told = os.environ.pop(ENVIRONMENT, None)
    if told is None:
        sys.stderr.write("error: this is started by 'vm-agent serve'\n")
        return EX_USAGE
    options = AgentOptions.from_json(told)
    configure_logs(options.log_level)

    async def make() -> AgentService:
        return AgentService(options)

    try:
        run_daemon(make)
    except SecFuNetError as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_CONFIG if isinstance(error, DoorError) else EX_FAILED
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
