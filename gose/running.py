"""What a running grid says of itself to its administrator (``gose status``): one JSON object to whoever connects to a Unix socket.

The socket lies in the grid's state folder, mode 0600: who may connect to it may read the state, too. It takes no commands, and no secret
comes out of it. The grid that makes it holds the lock of the state folder (``alone``): a second one on the same state does not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from gose.errors import GoseError
from secfunet.service.lock import LockHeldError, process_lock
from secfunet.service.unix_socket import bind_unix

SOCKET: Final = "status.sock"
LOCK: Final = "serve.lock"
TIMEOUT: Final = 5.0  # seconds for one report, either side
MAX_REPORT: Final = 64 * 2**20  # bytes


class RunningError(GoseError):
    """A grid runs, and does not say how it is."""


class _Report(BaseModel):
    # A field that is not known is of another version, and no fault.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Latency(_Report):
    """Of the last some hundred: the median and the 99th percentile, in seconds."""

    p50: float
    p99: float


class RunningCard(_Report):
    """A slot: ``state`` is connecting, in_service or out_of_service (``cause`` says why); ``queue`` names what it works off.

    Since the grid was started: ``jobs_done`` (batches, or leases of a server card), ``operations`` in them, ``errors`` among these by
    reason, ``busy_seconds`` that they occupied it. ``waited``: jobs in the queue, ``worked``: operations in the card (None: no sample yet).
    """

    seid: str
    state: str
    cause: str
    queue: str
    jobs_done: int
    operations: int = 0
    errors: dict[str, int] = {}
    busy_seconds: float = 0.0
    waited: Latency | None = None
    worked: Latency | None = None


class RunningSession(_Report):
    """A session, without its secret: ``name`` is what the grid's log calls it, ``token_id`` the JTI of its token. Times are UTC seconds."""

    name: str
    vmid: str
    hvid: str
    seid: str
    token_id: str = ""
    operations: tuple[str, ...]
    created_at: float
    expires_at: float


class RunningGrid(_Report):
    """The whole report, made at ``time``. ``queues``: how many jobs wait in each; ``refused``: how many were because it was too long."""

    pid: int
    version: str
    started_at: float
    time: float = 0.0
    streams: int
    cards: tuple[RunningCard, ...]
    queues: dict[str, int]
    refused: dict[str, int] = {}
    sessions: tuple[RunningSession, ...]


class AlreadyRunningError(GoseError):
    """A grid runs on this state folder."""

    def __init__(self, folder: Path, pid: int | None) -> None:
        who = "" if pid is None else f" (process {pid})"
        super().__init__(
            f"a grid runs on the state folder {folder} already{who}: one serves it, and 'gose status' shows it"
        )
        self.pid = pid


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other grid starts on this state folder meanwhile. Raises AlreadyRunningError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(process_lock(folder / LOCK))
        except LockHeldError as error:
            raise AlreadyRunningError(folder, error.pid) from None
        yield


@contextlib.asynccontextmanager
async def reporting(folder: Path, report: Callable[[], RunningGrid]) -> AsyncIterator[None]:
    """Answers whoever connects, as long as the context lives. Raises SocketPathError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                writer.write(report().model_dump_json().encode())
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        if not writer.transport.is_closing():
            writer.transport.abort()

    with _address(folder) as address:
        listener, own = bind_unix(Path(address), backlog=8)
        with own:
            server = await asyncio.start_unix_server(answer, sock=listener, backlog=8)
            try:
                yield
            finally:
                server.close()
                own.remove()
                await server.wait_closed()


async def ask_running_grid(folder: Path) -> RunningGrid | None:
    """How the grid on this state folder is; None if none runs. Raises RunningError."""
    try:
        async with asyncio.timeout(TIMEOUT):
            with _address(folder) as address:
                reader, writer = await asyncio.open_unix_connection(address)
            try:
                untrusted = await reader.read(MAX_REPORT)
                while chunk := await reader.read(MAX_REPORT):
                    untrusted += chunk
                    if len(untrusted) > MAX_REPORT:
                        raise RunningError("the running grid says too much")
            finally:
                writer.close()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except TimeoutError:
        raise RunningError(f"a grid runs on {folder}, and does not answer within {TIMEOUT:g} s") from None
    except OSError as error:
        raise RunningError(f"a grid runs on {folder}, and cannot be asked: {error}") from None
    try:
        return RunningGrid.model_validate_json(untrusted)
    except ValidationError:
        raise RunningError(f"a grid runs on {folder}, and its report cannot be read (another version?)") from None


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """A path to the socket that is short enough for any folder: a Unix socket's address has 107 bytes at most (unix(7))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
