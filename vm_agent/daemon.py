"""The process behind ``vm-agent serve``: as little in memory as it needs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import fields, replace

from secfunet.errors import SecFuNetError
from secfunet.service.daemon import run_daemon
from secfunet.service.doorkeeper import METRICS_BOUNDS
from secfunet.service.logs import configure_logs
from vm_agent.local_socket import DoorError
from vm_agent.options import ENVIRONMENT, AgentOptions
from vm_agent.server import AgentService

log = logging.getLogger(__name__)

MAX_OPTIONS = 65536  # bytes
READ_TIMEOUT = 30.0  # seconds
EX_FAILED, EX_USAGE, EX_CONFIG = 1, 2, 78  # as secfunet.service.cli.ExitCode, which comes with all of typer


class RunningAgent:
    """The service, and how SIGHUP has its settings read again: by a process of its own, which validates them and is gone."""

    def __init__(self, service: AgentService, options: AgentOptions, arguments: list[str]) -> None:
        self._service = service
        self._options = options
        self._arguments = arguments

    async def __aenter__(self) -> RunningAgent:
        await self._service.__aenter__()
        return self

    async def __aexit__(self, *problem: object) -> None:
        await self._service.__aexit__(*problem)

    async def reload(self) -> None:
        """The log level counts at once; all else is decided at the start, and what differs from it is said."""
        command = [sys.executable, "-m", "vm_agent.settings", *self._arguments]
        reader = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, limit=2 * MAX_OPTIONS
        )
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                said, problem = await reader.communicate()
        except TimeoutError:
            reader.kill()
            await reader.wait()
            log.error("the new settings were not read within %g s, everything stays as it was", READ_TIMEOUT)
            return
        if reader.returncode != 0:
            text = problem.decode(errors="replace").strip()
            log.error("the new settings cannot be used, everything stays as it was: %s", text)
            return
        new = AgentOptions.from_json(said.decode())
        differ = [field.name for field in fields(new) if getattr(new, field.name) != getattr(self._options, field.name)]
        logging.getLogger().setLevel(new.log_level.upper())
        self._options = replace(self._options, log_level=new.log_level)
        facts = {
            "changed": [name for name in differ if name == "log_level"],
            "needs_restart": [name for name in differ if name != "log_level"],
        }
        log.log(
            logging.WARNING if facts["needs_restart"] else logging.INFO, "the settings were read again", extra=facts
        )


def main() -> int:
    """Runs the agent until SIGTERM; returns the exit code."""
    told = os.environ.pop(ENVIRONMENT, None)
    if told is None:
        sys.stderr.write("error: this is started by 'vm-agent serve'\n")
        return EX_USAGE
    options = AgentOptions.from_json(told)
    configure_logs(options.log_level)

    async def make() -> RunningAgent:
        return RunningAgent(AgentService(options), options, sys.argv[1:])

    try:
        # A local program's connection: its own, and both ends of the one inside.
        run_daemon(make, descriptors=256 + METRICS_BOUNDS.descriptors + 3 * options.limits.connections)
    except SecFuNetError as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_CONFIG if isinstance(error, DoorError) else EX_FAILED
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
