"""A daemon's life: locked down, started, told to systemd, stopped by SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """No core dump of this process, and no ptrace by its own user: what it holds in memory stays there."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def notify_systemd(state: str) -> None:
    """Tells systemd (sd_notify(3)); does nothing if systemd did not start this process."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        notify.connect(address)
        notify.sendall(state.encode())


async def _keep_watchdog() -> None:
    """Feeds systemd's watchdog (sd_watchdog_enabled(3)) from the event loop: a loop that hangs stops feeding it."""
    period = int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    while period > 0:
        notify_systemd("WATCHDOG=1")
        await asyncio.sleep(period)


async def _serve(service: AbstractAsyncContextManager[object], ready: Callable[[], None] | None) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with service:
        watchdog = asyncio.create_task(_keep_watchdog())
        notify_systemd("READY=1")
        if ready is not None:
            ready()
        try:
            await stop.wait()
        finally:
            notify_systemd("STOPPING=1")
            watchdog.cancel()


def run_daemon(
    make_service: Callable[[], Awaitable[AbstractAsyncContextManager[object]]],
    *,
    ready: Callable[[], None] | None = None,
) -> None:
    """Runs the service until SIGTERM or SIGINT. Entering the context starts it (it then serves); leaving it stops it cleanly.

    ``make_service`` runs inside the event loop. Errors of start-up are the caller's to catch (``secfunet.service.cli``).
    """
    forbid_core_dumps()

    async def main() -> None:
        await _serve(await make_service(), ready)

    asyncio.run(main())
