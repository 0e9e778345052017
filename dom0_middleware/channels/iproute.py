"""Programs of iproute2: what the kernel knows of addresses, bridges and interfaces, and what it is told."""

from __future__ import annotations

import asyncio

from dom0_middleware.errors import MiddlewareError, Reason

TIMEOUT = 10.0  # seconds for a program to end


class FactsUnavailable(MiddlewareError):
    """The tables cannot be read."""

    def __init__(self, problem: str) -> None:
        super().__init__(Reason.HYPERVISOR_UNAVAILABLE, problem)


async def output(*command: str) -> bytes:
    """What a program of iproute2 prints. Raises FactsUnavailable if it fails."""
    try:
        async with asyncio.timeout(TIMEOUT):
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                output, _ = await process.communicate()
            except BaseException:
                process.kill()
                await process.wait()
                raise
    except (OSError, TimeoutError) as error:
        raise FactsUnavailable(f"{command[0]} cannot be asked: {error}") from error
    if process.returncode != 0:
        raise FactsUnavailable(f"{' '.join(command[:8])} ended with {process.returncode}")
    return output
