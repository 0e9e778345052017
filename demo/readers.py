"""Virtual readers for software cards: pcscd daemons of our own with Debian's vsmartcard-vpcd, 16 readers each; the system's is left alone.

A driver file of vpcd has two readers, and keeps them in variables of its own: more readers take copies of the file under other names. pcscd
has one fixed socket path, unless it is handed a socket as systemd would; its process number is kept apart, and USB readers are not its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo.processes import ProcessError, run
from secfunet.card.errors import CardError
from secfunet.card.pcsc import list_readers
from secfunet.card.place import PcscPlace
from secfunet.service.files import private_folder

PCSCD: Final = "/usr/sbin/pcscd"
DRIVER: Final = Path("/usr/lib/pcsc/drivers/serial/libifdvpcd.so")
SHIM: Final = Path(__file__).with_name("own_pcscd.c")
READERS: Final = 16
"""That one pcscd can have (pcsc-lite: PCSCLITE_MAX_READERS_CONTEXTS)."""
SLOTS: Final = 2
"""Readers of one driver file (vpcd: VPCDSLOTS)."""
START_TIMEOUT: Final = 10.0

_FIRST_PORT, _LAST_PORT = 20_000, 32_000
# A socket at descriptor 3, and the two variables of sd_listen_fds(3), one of which is the process's own number.
_HAND_OVER: Final = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
    "os.environ['LD_PRELOAD'] = sys.argv[2]; os.execv(sys.argv[3], sys.argv[3:])"
)


@dataclass(frozen=True)
class VirtualReader:
    """Where a software card attaches itself (TCP on loopback), and where programs find it then."""

    port: int
    place: PcscPlace

    @property
    def address(self) -> str:
        """As in a card's settings."""
        return f"127.0.0.1:{self.port}"


class Pcscd:
    """One pcscd with up to 16 virtual readers in ``folder``. ``ports``: those of its readers, two and two in a row."""

    def __init__(self, folder: Path, name: str, ports: Sequence[int], log: Path) -> None:
        if not 0 < len(ports) <= READERS:
            raise ValueError(f"a pcscd has 1 to {READERS} readers")
        self.name = name
        self.socket = folder / f"{name}.comm"
        self.log = log
        self._folder = folder / f"{name}.d"
        self._run = folder / f"{name}.run"
        self._shim = folder / f"{name}-own.so"
        self._process: asyncio.subprocess.Process | None = None
        self.readers = [
            VirtualReader(port, PcscPlace(f"{self._friendly(index // SLOTS)} 00 {index % SLOTS:02X}", self.socket))
            for index, port in enumerate(ports)
        ]

    def _friendly(self, driver: int) -> str:
        return f"SecFuNet {self.name} {driver}"

    @property
    def pid(self) -> int:
        """Its process id while it runs."""
        if not self.running or self._process is None:
            raise ProcessError(self.name, "does not run", "")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it; returns when it shows its readers. Raises ProcessError."""
        await self._prepare()
        # Its socket is for this user alone: nobody needs to be asked who may open it (pcsc-lite 2.0 and newer).
        offered = (await run(PCSCD, "--help")).output.decode()
        without_polkit = ("--disable-polkit",) if "--disable-polkit" in offered else ()
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, self.log.open("ab") as log:
            listener.bind(str(self.socket))
            self.socket.chmod(0o600)
            listener.listen(64)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", _HAND_OVER, str(listener.fileno()), str(self._shim)),
                *(PCSCD, "--foreground", "--config", str(self._folder), *without_polkit),
                pass_fds=(listener.fileno(),),
                env={**os.environ, "OWN_PCSCD_RUN": str(self._run)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        missing = {reader.place.reader for reader in self.readers}
        while missing:
            if not self.running or asyncio.get_running_loop().time() > deadline:
                await self.kill()
                raise ProcessError(
                    self.name, f"shows no readers: {sorted(missing)}", self.log.read_text(errors="replace")
                )
            with contextlib.suppress(CardError):
                missing -= {seen.name for seen in await list_readers(self.socket, timeout=START_TIMEOUT)}
            await asyncio.sleep(0.05)
        self._refuse_open_doors()

    async def _prepare(self) -> None:
        missing = [str(path) for path in (Path(PCSCD), DRIVER) if not path.exists()]
        if missing:
            raise ProcessError(self.name, f"needs pcscd and vsmartcard-vpcd; not there: {', '.join(missing)}", "")
        private_folder(self._folder)
        private_folder(self._run)
        if not self._shim.exists():
            await run("cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", self._shim, SHIM, "-ldl")
        for driver in range((len(self.readers) + SLOTS - 1) // SLOTS):
            library = self._folder.parent / f"{self.name}-driver-{driver}.so"
            if not library.exists():
                shutil.copyfile(DRIVER, library)
            port = self.readers[driver * SLOTS].port
            (self._folder / f"reader-{driver}").write_text(
                f'FRIENDLYNAME "{self._friendly(driver)}"\nDEVICENAME /dev/null:{port}\nLIBPATH {library}\nCHANNELID {port}\n'
            )

    def _refuse_open_doors(self) -> None:
        """A reader that listens for the whole network would take anybody's card, and give it the PIN."""
        ports = {reader.port for reader in self.readers}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) in ports and address != _LOOPBACK:
                raise ProcessError(self.name, f"listens on port {int(port, 16)} for everybody", "")

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL if it does not heed that; returns the exit code."""
        if self._process is None:
            return 0
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), START_TIMEOUT)
            except TimeoutError:
                await self.kill()
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        return self._process.returncode or 0

    async def kill(self) -> None:
        """SIGKILL, as in a crash."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


_LOOPBACK: Final = int.from_bytes(socket.inet_aton("127.0.0.1"), sys.byteorder).to_bytes(4).hex().upper()


def free_ports(count: int) -> list[int]:
    """``count`` ports on loopback that nobody listens on, each two a pair in a row, as the driver takes them."""
    chosen: list[int] = []
    while len(chosen) < count:
        first = _FIRST_PORT + 2 * secrets.randbelow((_LAST_PORT - _FIRST_PORT) // 2)
        if first in chosen:
            continue
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in (first, first + 1):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            chosen += [first, first + 1]
    return chosen[:count]


def virtual_readers(folder: Path, ports: Sequence[int], logs: Path) -> list[Pcscd]:
    """As many daemons as it takes to have a reader at each port."""
    return [
        Pcscd(
            folder,
            f"pcscd-{1 + begin // READERS}",
            ports[begin : begin + READERS],
            logs / f"pcscd-{1 + begin // READERS}.log",
        )
        for begin in range(0, len(ports), READERS)
    ]


async def await_card(place: PcscPlace, *, timeout: float = START_TIMEOUT) -> None:
    """Returns when the reader has noticed a card. Raises ProcessError."""
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        with contextlib.suppress(CardError):
            seen = await list_readers(place.daemon, timeout=timeout)
            if any(reader.name == place.reader and reader.has_card for reader in seen):
                return
        if asyncio.get_running_loop().time() > deadline:
            raise ProcessError(str(place), f"has no card after {timeout:g} s", "")
        await asyncio.sleep(0.05)
