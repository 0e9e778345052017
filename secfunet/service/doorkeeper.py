"""Connections counted, bounded and timed from accept on, for all doors of a program together and for each address.

A connection is in one of three places, each with a bound of its own, so that strangers never take the places of those who were let in:

- *silent*: accepted, and its first TLS record has not come. It costs a descriptor and nothing else: no TLS, no buffers, no task.
- *talking*: its handshake is under way, in a task. A door calls ``Visit.enter`` when it is over.
- *inside*: counted at its door, by address or by whoever the door says holds it. The door times it from then on.

Where there is no room the oldest connection leaves of whoever holds the most places. An IPv6 /64 is one address.

A descriptor that cannot be had is met with a pause, a line of the log a second, and the end of silent connections; some descriptors are
kept for cards, files and clients all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from secfunet.errors import SecFuNetError
from secfunet.service.addresses import rate_key, text_of_address
from secfunet.service.crowd import Crowd
from secfunet.service.flood_log import FloodLog

_log = logging.getLogger(__name__)

BACKLOG: Final = 4096
TOO_MANY: Final = "too many connections"
KEPT_DESCRIPTORS: Final = 64  # for everything that is not a connection of a stranger
_BATCH: Final = 64  # connections accepted in one turn of the loop
_GRACE: Final = (
    0.5  # seconds that a connection has before it is ended for another one; with no older one, accepting waits so long
)
_SHORTAGE_PAUSE: Final = (0.1, 1.0)  # seconds without accepting when descriptors are short: first and longest
_SHORTAGE_EVICTIONS: Final = 16
_RECORD_HEAD, _HANDSHAKE_RECORD, _MAX_RECORD = 5, 0x16, 2**14  # RFC 8446, 5.1
_JUST_USED: Final = 5.0  # seconds
_visit: contextvars.ContextVar[Visit] = contextvars.ContextVar("secfunet_visit")


@dataclass(frozen=True)
class DoorBounds:
    """For all doors of one program together. ``per_address``: the part that one address may have. Times in seconds."""

    silent: int = 1024
    talking: int = 256
    per_address: float = 0.75
    silence: float = 10.0
    handshake: float = 15.0

    @property
    def descriptors(self) -> int:
        """What strangers may take."""
        return self.silent + self.talking


METRICS_BOUNDS: Final = DoorBounds(silent=256, talking=64, silence=5.0, handshake=5.0)
"""Of a metrics port, which has a doorkeeper of its own (``metrics``)."""


class DoorFullError(SecFuNetError):
    """There is no place inside for this connection."""


class Visit:
    """One connection, from accept to its end."""

    __slots__ = (
        "_taken",
        "_timer",
        "address",
        "awaited",
        "busy",
        "doorway",
        "peer",
        "since",
        "socket",
        "task",
        "used_at",
    )

    def __init__(self, doorway: Doorway, connection: socket.socket, peer: str) -> None:
        self.doorway = doorway
        self.socket = connection
        self.peer = text_of_address(peer)
        """For logs."""
        self.address = rate_key(peer)
        """Under what it is counted."""
        self.since = doorway._loop.time()
        """When it came to the place where it is."""
        self.busy = False
        """Whether it must not be ended in favour of another one inside; its door says so."""
        self.used_at: float | None = None
        """When it was last of use (the loop's time); None: it never was. Its door says so."""
        self.task: asyncio.Task[None] | None = None
        self.awaited = 1
        """Bytes that its handshake waits for to begin."""
        self._timer: asyncio.TimerHandle | None = None
        self._taken = False

    def take(self) -> socket.socket:
        """The socket, for whoever closes it from now on (a transport)."""
        self._taken = True
        return self.socket

    def enter(self, holder: str | None = None) -> None:
        """The handshake is over. ``holder``: under whom it is counted inside; None: its address. Raises DoorFullError."""
        self.doorway._enter(self, holder)

    def _start_timer(self, seconds: float, late: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_for(self, count: int) -> None:
        """The socket counts as readable only with so many bytes: a record that trickles in wakes nobody."""
        self.awaited = count
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _close_socket(self) -> None:
        if not self._taken:
            self._taken = True
            self.socket.close()


Serve = Callable[[Visit], Awaitable[None]]
"""Does the handshake, calls ``Visit.enter``, and returns when the connection is over; it is cancelled to end it."""


def current_visit() -> Visit | None:
    """The visit whose task this is; None in any other."""
    return _visit.get(None)


class Doorkeeper:
    """One for a program; each of its listening addresses is a Doorway."""

    def __init__(self, bounds: DoorBounds | None = None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.bounds = bounds or DoorBounds()
        part = self.bounds.per_address
        self.silent: Crowd[Visit] = Crowd(self.bounds.silent, max(1, round(part * self.bounds.silent)))
        self.talking: Crowd[Visit] = Crowd(self.bounds.talking, max(1, round(part * self.bounds.talking)))
        self.ended: Counter[str] = Counter()
        """Connections that were ended here, by reason."""
        self.log = FloodLog(_log, monotonic=monotonic)
        self._doorways: set[Doorway] = set()
        self._shortage_pause = _SHORTAGE_PAUSE[0]

    async def open(
        self,
        name: str,
        serve: Serve,
        host: str | None = None,
        port: int = 0,
        *,
        inside: int | None = None,
        per_holder: int | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> Doorway:
        """Listens at all addresses of ``host``. ``inside``: how many connections there may be after their handshakes, and
        ``per_holder`` how many of one holder; ``refused`` is told of each that finds no place there. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listeners: list[socket.socket] = []
        try:
            for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
                listeners.append(_listener(family, address))
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        return self.attend(name, serve, listeners, inside=inside, per_holder=per_holder, refused=refused)

    def attend(
        self,
        name: str,
        serve: Serve,
        listeners: Sequence[socket.socket],
        *,
        inside: int | None = None,
        per_holder: int | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> Doorway:
        """As ``open``, at sockets that listen already."""
        doorway = Doorway(self, name, serve, listeners, inside, per_holder, refused)
        self._doorways.add(doorway)
        return doorway

    def _note(self, reason: str, visit: Visit) -> None:
        self.ended[reason] += 1
        self.log.info(reason, "a connection was ended", {"door": visit.doorway.name, "peer": visit.peer})

    def _shortage(self, error: OSError) -> None:
        """No descriptor, or no memory for one: strangers leave, and nobody is accepted for a while."""
        self.log.warning("no descriptors", "no connection can be accepted now", {"cause": error.strerror or str(error)})
        for visit in self.silent.members()[:_SHORTAGE_EVICTIONS]:
            visit.doorway._end_silent(visit, "no descriptors")
        for doorway in self._doorways:
            doorway._pause(self._shortage_pause)
        self._shortage_pause = min(2 * self._shortage_pause, _SHORTAGE_PAUSE[1])

    def _accepted(self) -> None:
        self._shortage_pause = _SHORTAGE_PAUSE[0]


class Doorway:
    """One door; made by Doorkeeper."""

    def __init__(
        self,
        keeper: Doorkeeper,
        name: str,
        serve: Serve,
        listeners: Sequence[socket.socket],
        inside: int | None,
        per_holder: int | None,
        refused: Callable[[], None],
    ) -> None:
        self.name = name
        self.inside: Crowd[Visit] = Crowd(inside if inside is not None else 2**31, per_holder)
        self._keeper = keeper
        self._serve = serve
        self._refused = refused
        self._listeners = list(listeners)
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening = True
        for listener in self._listeners:
            listener.setblocking(False)
        self._watch()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty when closed."""
        return tuple(self._listeners)

    def close(self) -> None:
        """Accepts no more, and ends the connections that are not inside yet."""
        if not self._listening:
            return
        self._listening = False
        self._unwatch()
        if self._resume is not None:
            self._resume.cancel()
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        self._keeper._doorways.discard(self)
        for visit in self._keeper.silent.members():
            if visit.doorway is self:
                self._end_silent(visit)
        for visit in self._keeper.talking.members():
            if visit.doorway is self and visit.task is not None:
                visit.task.cancel()

    def end_all(self) -> None:
        """Ends the connections inside, too."""
        for task in self._tasks:
            task.cancel()

    async def wait_closed(self) -> None:
        """Until every connection is over; call close() before."""
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    # --- accepting

    def _watch(self) -> None:
        self._resume = None
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def _unwatch(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)

    def _pause(self, seconds: float) -> None:
        if not self._listening:
            return
        if self._resume is not None:
            self._resume.cancel()
        self._unwatch()
        self._resume = self._loop.call_later(seconds, self._watch)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_BATCH):
            if self._resume is not None or not self._listening:
                return
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                self._keeper._shortage(error)
                return
            connection.setblocking(False)
            visit = Visit(self, connection, str(address[0]) if isinstance(address, tuple) else "")
            if connection.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - KEPT_DESCRIPTORS:
                if not len(self._keeper.silent):
                    connection.close()
                    self._keeper._shortage(OSError(0, "the last descriptors are kept for other uses"))
                    return
                self._make_room(self._keeper.silent, visit, is_short=True)
                # It moves to the number that became free: the highest number says how many are in use.
                visit.socket = connection.dup()
                connection.close()
            self._keeper._accepted()
            self._arrived(visit)

    def _arrived(self, visit: Visit) -> None:
        missing = _missing(visit.socket)
        if missing == 0:
            self._talk(visit)
        elif missing < 0:
            visit._close_socket()
        else:
            self._make_room(self._keeper.silent, visit)
            self._keeper.silent.add(visit, visit.address)
            visit._wait_for(missing)
            self._loop.add_reader(visit.socket, self._heard, visit)
            visit._start_timer(self._keeper.bounds.silence, lambda: self._end_silent(visit, "silent for too long"))

    def _heard(self, visit: Visit) -> None:
        missing = _missing(visit.socket)
        if missing > visit.awaited:
            visit._wait_for(missing)  # its first record's head has come
            return
        # As much as was waited for, or the end of the connection: the kernel wakes nobody for less.
        self._loop.remove_reader(visit.socket)
        self._keeper.silent.remove(visit)
        visit._stop_timer()
        if missing == 0:
            self._talk(visit)
        else:
            visit._close_socket()

    def _end_silent(self, visit: Visit, reason: str = "") -> None:
        self._loop.remove_reader(visit.socket)
        self._keeper.silent.remove(visit)
        visit._stop_timer()
        visit._close_socket()
        if reason:
            self._keeper._note(reason, visit)

    def _make_room(self, crowd: Crowd[Visit], visit: Visit, *, is_short: bool = False) -> None:
        """Ends the connection that ``visit`` replaces, if there is no room beside it."""
        if not (is_short or crowd.is_full_for(visit.address)):
            return
        oldest = crowd.victim(visit.address)
        if oldest is None:
            return
        missing = _GRACE - (self._loop.time() - oldest.since)
        if crowd is self._keeper.silent:
            oldest.doorway._end_silent(oldest, "too many silent connections")
        else:
            oldest.doorway._end_talking(oldest, "too many handshakes")
        if missing > _GRACE / 20:
            self._pause(missing)

    # --- talking

    def _talk(self, visit: Visit) -> None:
        if visit.awaited != 1:
            visit._wait_for(1)
        if len(self.inside) >= self.inside.limit and all(other.busy for other in self.inside.members()):
            # Nobody could come in: that is said before any work is done for it.
            visit._close_socket()
            self._refuse(visit)
            return
        self._make_room(self._keeper.talking, visit)
        visit.since = self._loop.time()
        self._keeper.talking.add(visit, visit.address)
        visit._start_timer(self._keeper.bounds.handshake, lambda: self._end_talking(visit, "too long in its handshake"))
        task = visit.task = self._loop.create_task(self._run(visit), name=f"{self.name} {visit.peer}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(visit, task))

    def _end_talking(self, visit: Visit, reason: str) -> None:
        # Not counted from now on, though its task may need a turn or two of the loop to end.
        self._keeper.talking.remove(visit)
        visit._stop_timer()
        self._keeper._note(reason, visit)
        if visit.task is not None:
            visit.task.cancel()

    def _refuse(self, visit: Visit) -> None:
        self._keeper.ended[TOO_MANY] += 1
        self._keeper.log.warning(TOO_MANY, "a connection was refused", {"door": self.name, "peer": visit.peer})
        self._refused()

    async def _run(self, visit: Visit) -> None:
        _visit.set(visit)
        log = self._keeper.log
        try:
            await self._serve(visit)
        except DoorFullError:
            self._refuse(visit)
        except (OSError, ssl.SSLError, SecFuNetError) as error:
            log.info(
                "a connection failed",
                "a connection failed",
                {"door": self.name, "peer": visit.peer, "cause": str(error) or type(error).__name__},
            )
        except Exception as error:
            log.exception(
                "a connection could not be served",
                "a connection could not be served",
                {"door": self.name, "peer": visit.peer},
                error=error,
            )

    def _over(self, visit: Visit, task: asyncio.Task[None]) -> None:
        # Not in the task itself: one that is cancelled before its first turn runs nothing.
        self._tasks.discard(task)
        visit._stop_timer()
        self._keeper.talking.remove(visit)
        self.inside.remove(visit)
        visit._close_socket()

    # --- inside

    def _enter(self, visit: Visit, holder: str | None) -> None:
        if visit in self.inside:
            return
        holder = holder if holder is not None else visit.address
        if self.inside.is_full_for(holder):
            oldest = self.inside.victim(holder, lambda other: self._may_leave(other, holder))
            if oldest is None:
                raise DoorFullError(TOO_MANY)
            self.inside.remove(oldest)
            self._keeper._note(TOO_MANY, oldest)
            if oldest.task is not None:
                oldest.task.cancel()
        visit._stop_timer()
        self._keeper.talking.remove(visit)
        self.inside.add(visit, holder)

    def _may_leave(self, other: Visit, holder: str) -> bool:
        """Not in the middle of something; nor is what the same holder has just used thrown out for one more of its own."""
        if other.busy:
            return False
        if other.used_at is None or self.inside.holder_of(other) != holder:
            return True
        return self._loop.time() - other.used_at >= _JUST_USED


def _missing(connection: socket.socket) -> int:
    """0 when a whole TLS record has come (or what is not TLS at all), -1 at the end of the connection, else how many bytes to wait for."""
    try:
        head = connection.recv(_RECORD_HEAD, socket.MSG_PEEK)
        if not head:
            return -1
        if head[0] != _HANDSHAKE_RECORD:
            return 0
        if len(head) < _RECORD_HEAD:
            return _RECORD_HEAD
        whole = _RECORD_HEAD + min(int.from_bytes(head[3:]), _MAX_RECORD)
        return 0 if len(connection.recv(whole, socket.MSG_PEEK)) >= whole else whole
    except (BlockingIOError, InterruptedError):
        return 1
    except OSError:
        return -1


def _listener(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{address[0]}:{address[1]} cannot be listened at: {error.strerror}") from None
    return listener
