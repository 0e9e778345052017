"""Daemons as child processes: started, waited for by the sd_notify protocol, stopped by SIGTERM; commands, run to their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secfunet.errors import SecFuNetError

COMMANDS = Path(sys.executable).parent  # where this environment's commands are


class ProcessError(SecFuNetError):
    """A process did not do what it was started for; its text has the end of what it printed."""

    def __init__(self, name: str, what: str, output: str) -> None:
        tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[-12:])
        super().__init__(f"{name} {what}" + (f":\n{tail}" if tail else ""))
        self.name = name
        self.output = output


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ran to its end."""

    exit_code: int
    output: bytes
    errors: str


async def run(
    *command: str | Path,
    input_data: bytes | None = None,
    check: bool = True,
    timeout: float = 60.0,
    cwd: Path | None = None,
) -> Finished:
    """Runs one of this environment's commands (or any other program) to its end.

    Raises ProcessError if ``check`` and the exit code is not 0, or if it takes longer than ``timeout`` seconds (it is then killed).
    """
    name = Path(command[0]).name
    own = COMMANDS / name
    process = await asyncio.create_subprocess_exec(
        str(own if own.exists() else command[0]),
        *(str(word) for word in command[1:]),
        stdin=asyncio.subprocess.PIPE if input_data is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(input_data), timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise ProcessError(name, f"took longer than {timeout:g} s", "") from None
        raise
    text = errors.decode(errors="replace")
    if check and process.returncode != 0:
        raise ProcessError(" ".join(str(word) for word in command[:3]), f"ended with {process.returncode}", text)
    return Finished(process.returncode or 0, output, text)


class Daemon:
    """One daemon: ``start`` returns when it says READY=1, as it would to systemd."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, *, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._command = [str(COMMANDS / str(command[0])), *(str(word) for word in command[1:])]
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None
        self._ready_once = False

    @property
    def pid(self) -> int:
        """The process id while it runs."""
        if self._process is None or self._process.returncode is not None:
            raise ProcessError(self.name, "does not run", "")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, *, timeout: float = 30.0) -> None:
        """Starts it and waits for READY=1. Raises ProcessError with the end of its log if it ends or stays silent."""
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._ready_once = False
        address = f"\0secfunet-demo-{os.urandom(16).hex()}"
        with notify:
            notify.bind(address)
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the one who started it, who ends it in its turn
                    env={**os.environ, **self._environment, "NOTIFY_SOCKET": "@" + address[1:]},
                )
            ready = asyncio.ensure_future(self._ready(notify))
            ended = asyncio.ensure_future(self._process.wait())
            await asyncio.wait({ready, ended}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            done = ready.done()
            for task in (ready, ended):
                task.cancel()
        self._ready_once = done
        if not done:
            what = f"was not ready after {timeout:g} s" if self.running else f"ended with {self._process.returncode}"
            await self.kill()
            raise ProcessError(self.name, what, self.log.read_text(errors="replace"))

    @staticmethod
    async def _ready(notify: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while b"READY=1" not in await loop.sock_recv(notify, 4096):
            pass

    async def stop(self, *, timeout: float = 10.0) -> int:
        """SIGTERM, and SIGKILL if that is not heeded in time; returns the exit code (negative: the signal that ended it).

        One that had not said yet that it is ready may be ended by the signal itself: that counts as 0.
        """
        if self._process is None:
            return 0
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), timeout)
            except TimeoutError:
                await self.kill()
        if not self._ready_once and self._process.returncode == -signal.SIGTERM:
            return 0
        return self._process.returncode or 0

    async def kill(self) -> None:
        """SIGKILL: nothing is cleaned up, as in a crash."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
