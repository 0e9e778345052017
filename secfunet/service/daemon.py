"""A daemon's life: locked down, started, told to systemd, stopped by SIGTERM or SIGINT; SIGHUP has it read its settings again."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from secfunet.errors import SecFuNetError

log = logging.getLogger(__name__)

PR_SET_DUMPABLE = 4


@runtime_checkable
class Reloadable(Protocol):
    """A running service that can read its settings again."""

    def reload(self) -> Awaitable[None] | None:
        """Reads them, and says in the log what changed. A file that cannot be used changes nothing."""
        ...


def survive_hangup() -> None:
    """SIGHUP ends no daemon, from here on: a closed terminal or a careless script sends it, to one that still starts, too."""
    with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's affair
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


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


def want_descriptors(needed: int) -> None:
    """Raises this process's limit of descriptors to ``needed``, what its own bounds come to; warns where the hard limit is below."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    if soft != infinite and soft < needed:
        soft = needed if hard == infinite else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != infinite and soft < needed:
        log.warning(
            "the limit of descriptors (LimitNOFILE= of the unit, ulimit -n) is below what this program's bounds come to",
            extra={"limit": soft, "needed": needed},
        )


async def _keep_watchdog() -> None:
    """Feeds systemd's watchdog (sd_watchdog_enabled(3)) from the event loop: a loop that hangs stops feeding it."""
    period = int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    while period > 0:
        notify_systemd("WATCHDOG=1")
        await asyncio.sleep(period)


async def _reload_at_hangup(running: object, hangup: asyncio.Event) -> None:
    """One at a time; those that come meanwhile are one more."""
    while True:
        await hangup.wait()
        hangup.clear()
        if not isinstance(running, Reloadable):
            log.info("SIGHUP: there is nothing to read again")
            continue
        notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            if (reading := running.reload()) is not None:
                await reading
        except (SecFuNetError, OSError) as error:
            log.error("the settings could not be read again: %s", error)
        except Exception:
            log.exception("a fault in this program while the settings were read again")
        notify_systemd("READY=1")  # not where a stop cuts it short


async def _serve(service: AbstractAsyncContextManager[object], ready: Callable[[], None] | None) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hangup = asyncio.Event()
    # Not a handler of the loop's: when the loop closes, that would make SIGHUP deadly for what is left of the process.
    signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(hangup.set))
    try:
        await _run(service, stop, hangup, ready)
    finally:
        survive_hangup()


async def _run(
    service: AbstractAsyncContextManager[object],
    stop: asyncio.Event,
    hangup: asyncio.Event,
    ready: Callable[[], None] | None,
) -> None:
    async with service as running:
        watchdog = asyncio.create_task(_keep_watchdog())
        reloader = asyncio.create_task(_reload_at_hangup(running, hangup))
        notify_systemd("READY=1")
        if ready is not None:
            ready()
        try:
            await stop.wait()
        finally:
            notify_systemd("STOPPING=1")
            watchdog.cancel()
            reloader.cancel()
            await asyncio.gather(reloader, return_exceptions=True)


def run_daemon(
    make_service: Callable[[], Awaitable[AbstractAsyncContextManager[object]]],
    *,
    ready: Callable[[], None] | None = None,
    descriptors: int = 512,
) -> None:
    """Runs the service until SIGTERM or SIGINT. Entering the context starts it (it then serves); leaving it stops it cleanly. If what
    entering gave is ``Reloadable``, SIGHUP reloads it.

    ``make_service`` runs inside the event loop. Errors of start-up are the caller's to catch (``secfunet.service.cli``).
    ``descriptors``: how many it may need, when all of its bounds are reached.
    """
    survive_hangup()
    forbid_core_dumps()
    want_descriptors(descriptors)

    async def main() -> None:
        await _serve(await make_service(), ready)

    asyncio.run(main())
