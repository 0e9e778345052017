"""Shared-memory channels between two domains, through Xen's own library (libxenvchan.h), for asyncio.

A channel is a pair of byte rings in pages that the server grants to one domain, and an event channel that is bound to that domain: Xen
itself keeps every other domain from it. Setting up and tearing down exchange a few messages with xenstore and run in a thread; reading
and writing are memory copies, and the event channel's descriptor says when there is more. A peer can send events without end: they are
taken at a bounded rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from typing import Any, Self

from secfunet.service.rate import TokenBucket
from secfunet.xen.errors import VchanError
from secfunet.xen.libraries import load

PACKAGE = "libxenmisc4.17"
RING_SIZE = 16384  # bytes, each way: 9 pages a channel; dom0's xen_gntalloc allows 1024 pages in all unless it is told otherwise
_CLOSED, _OPEN, _NO_CLIENT_YET = (
    0,
    1,
    2,
)  # libxenvchan_is_open; a guest that was migrated sees 255: its pages lead nowhere
_CHUNK = 65536
EVENTS_PER_SECOND, EVENTS_AT_ONCE = 4096, 8192
EVENT_PAUSE = 0.005  # seconds without looking at events, once they come faster


class _Head(ctypes.Structure):
    """The public beginning of ``struct libxenvchan``, up to its flags."""

    _fields_ = (
        ("grants", ctypes.c_void_p),
        ("ring", ctypes.c_void_p),
        ("event", ctypes.c_void_p),
        ("event_port", ctypes.c_uint32),
        ("is_server", ctypes.c_int, 1),
        ("server_persist", ctypes.c_int, 1),
        ("blocking", ctypes.c_int, 1),
    )


class Vchan:
    """One end of a channel. Not for several tasks that read, or that write, at once."""

    def __init__(self, library: ctypes.CDLL, handle: int, *, is_client: bool) -> None:
        self._library = library
        self._is_client = is_client
        self._handle: int | None = handle
        self._changed = asyncio.Event()
        self._events = TokenBucket(EVENTS_PER_SECOND, EVENTS_AT_ONCE)
        self._paused: asyncio.TimerHandle | None = None
        self._buffer = ctypes.create_string_buffer(_CHUNK)
        self._descriptor = int(library.libxenvchan_fd_for_select(handle))
        os.set_blocking(self._descriptor, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._on_event)

    @classmethod
    async def serve(cls, domain_id: int, path: str, *, ring_size: int = RING_SIZE) -> Self:
        """Makes a channel for domain ``domain_id``, announced at the absolute xenstore ``path``. Raises VchanError, XenError."""
        library = _library()
        return await cls._make(
            library,
            lambda: library.libxenvchan_server_init(None, domain_id, path.encode(), ring_size, ring_size),
            f"no channel can be made for domain {domain_id}",
            is_client=False,
        )

    @classmethod
    async def connect(cls, domain_id: int, path: str) -> Self:
        """Opens the channel that ``domain_id`` serves at ``path`` (relative: in this domain's home). Raises VchanError, XenError."""
        library = _library()
        return await cls._make(
            library,
            lambda: library.libxenvchan_client_init(None, domain_id, path.encode()),
            f"the channel of domain {domain_id} at {path} cannot be opened",
            is_client=True,
        )

    @classmethod
    async def _make(cls, library: ctypes.CDLL, init: Any, what: str, *, is_client: bool) -> Self:
        def call() -> tuple[int | None, int]:
            # errno is a thread's own.
            ctypes.set_errno(0)
            handle = init()
            code = ctypes.get_errno()
            if handle:
                # The library leaves this flag as malloc gave it. Set by chance, it makes a read of an empty ring wait: and a whole daemon.
                _Head.from_address(handle).blocking = 0
            return handle, code

        task = asyncio.ensure_future(asyncio.to_thread(call))
        try:
            handle, code = await asyncio.shield(task)
        except asyncio.CancelledError:
            # The thread goes on: what it makes must not be left behind.
            task.add_done_callback(lambda done: _discard(library, done))
            raise
        if not handle:
            raise VchanError(f"{what}: {os.strerror(code) if code else 'refused'}", code)
        return cls(library, handle, is_client=is_client)

    @property
    def is_open(self) -> bool:
        """Both ends are there."""
        return self._state() == _OPEN

    async def accepted(self) -> None:
        """Of a server: returns when a client has come. Raises VchanError if the channel was closed."""
        while (state := self._state()) == _NO_CLIENT_YET:
            await self._change()
        if state != _OPEN and not self._ready():
            raise VchanError("the channel was closed before a client came")

    async def read(self) -> bytes:
        """What has come, at least a byte; empty once the peer has closed the channel. Returns without waiting while there is something."""
        while self._handle is not None:
            count = self._library.libxenvchan_read(self._handle, self._buffer, _CHUNK)
            if count > 0:
                return self._buffer.raw[:count]
            if count < 0 or self._state() not in (_OPEN, _NO_CLIENT_YET):
                return b""
            await self._change()
        return b""

    async def write(self, data: bytes) -> None:
        """Raises VchanError once the channel is closed."""
        view = memoryview(data)
        while view:
            if self._handle is None or self._state() != _OPEN:
                raise VchanError("the channel is closed")
            chunk = bytes(view[:_CHUNK])
            count = self._library.libxenvchan_write(self._handle, chunk, len(chunk))
            if count < 0:
                raise VchanError("the channel is closed")
            view = view[count:]
            if count == 0:
                await self._change()
            else:
                await asyncio.sleep(0)  # a peer that makes room at once must not keep the loop

    async def close(self) -> None:
        """Unmaps the rings and tells the peer. Does nothing the second time.

        A client whose pages lead nowhere abandons the channel. Not a server: what it reads there its client has written, which could have
        it keep page after page.
        """
        if self._is_client and self._state() not in (_CLOSED, _OPEN, _NO_CLIENT_YET):
            self.abandon()
        elif (handle := self._let_go()) is not None:
            await asyncio.shield(asyncio.to_thread(self._library.libxenvchan_close, handle))

    def abandon(self) -> None:
        """Lets go of the channel without a word to Xen; its pages and descriptor stay until the process ends.

        For a guest that was migrated with the channel open: to close it hits a BUG in Linux (6.1, drivers/xen/evtchn.c: the event channel
        is not bound any more), which kills the thread that does.
        """
        self._let_go()

    def _let_go(self) -> int | None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._loop.remove_reader(self._descriptor)
            if self._paused is not None:
                self._paused.cancel()
            self._changed.set()
        return handle

    def _state(self) -> int:
        return int(self._library.libxenvchan_is_open(self._handle)) if self._handle is not None else 0

    def _ready(self) -> bool:
        return self._handle is not None and int(self._library.libxenvchan_data_ready(self._handle)) > 0

    def _on_event(self) -> None:
        # Takes the event; without one it would say so, as the descriptor does not block.
        if self._handle is None:
            return
        self._library.libxenvchan_wait(self._handle)
        self._changed.set()
        if self._events.take():
            self._loop.remove_reader(self._descriptor)
            self._paused = self._loop.call_later(EVENT_PAUSE, self._resume)

    def _resume(self) -> None:
        self._paused = None
        if self._handle is not None:
            self._loop.add_reader(self._descriptor, self._on_event)
            self._changed.set()

    async def _change(self) -> None:
        """Returns when something may have changed. Two tasks (a reader and a writer) may wait at once."""
        if self._changed.is_set():
            self._changed = asyncio.Event()
            # Whatever came before the flag was taken down is looked at once more.
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            # A safety net: a peer that dies without a word sends no event.
            async with asyncio.timeout(1.0):
                await self._changed.wait()


def _discard(library: ctypes.CDLL, done: asyncio.Future[tuple[int | None, int]]) -> None:
    if not done.cancelled() and done.exception() is None and done.result()[0]:
        library.libxenvchan_close(done.result()[0])


def _library() -> ctypes.CDLL:
    library = load("xenvchan", PACKAGE)
    handle, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    for name, result, arguments in (
        ("server_init", handle, [ctypes.c_void_p, number, ctypes.c_char_p, size, size]),
        ("client_init", handle, [ctypes.c_void_p, number, ctypes.c_char_p]),
        ("read", number, [handle, ctypes.c_void_p, size]),
        ("write", number, [handle, ctypes.c_void_p, size]),
        ("wait", number, [handle]),
        ("is_open", number, [handle]),
        ("data_ready", number, [handle]),
        ("fd_for_select", number, [handle]),
        ("close", None, [handle]),
    ):
        function = getattr(library, f"libxenvchan_{name}")
        function.restype, function.argtypes = result, arguments
    return library
