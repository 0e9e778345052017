"""A socket that listens for one guest: it is served at a bounded rate, and whoever else knocks is gone before anything is done about it.

Strangers are told by their source address alone and closed at once. While many come, the kernel drops what they send (a socket filter on
the port), so that they cost this program nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from secfunet.service.rate import TokenBucket

ACCEPTED_A_TURN = 16
BACKLOG = 128
PER_SECOND, AT_ONCE = 8, 64  # connections of the entitled
PAUSE = 0.25  # seconds at least without accepting, beyond that
STRANGERS_PER_SECOND, STRANGERS_AT_ONCE = 10, 64
FILTERED = 10.0  # seconds for which strangers are dropped by the kernel, beyond that
FIRST_PENALTY, LONGEST_PENALTY = 10.0, 600.0  # seconds without accepting, after a flood
NO_ROOM = 1.0  # seconds without accepting, when there are no descriptors

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
_NETWORK_HEADER = 0x100000000 - 0x100000  # SKF_NET_OFF of linux/filter.h
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K

Address = IPv4Address | IPv6Address


def source_filter(address: Address) -> bytes:
    """A classic BPF program (struct sock_filter) that lets packets from ``address`` pass and no others."""
    words = struct.unpack(f">{len(address.packed) // 4}I", address.packed)
    first = _NETWORK_HEADER + (12 if address.version == 4 else 8)  # of the source address in the header
    program = []
    for index, word in enumerate(words):
        program.append((_LOAD, 0, 0, first + 4 * index))
        # To the last instruction, if it is another's.
        program.append((_JUMP_IF_EQUAL, 0, 2 * (len(words) - index) - 1, word))
    program += [(_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)]
    return b"".join(struct.pack("=HBBI", *one) for one in program)


def attach(listener: socket.socket, address: Address) -> None:
    """From now on the kernel gives ``listener`` only what comes from ``address``."""
    program = source_filter(address)
    kept = ctypes.create_string_buffer(program)
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(kept))  # struct sock_fprog
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def listen(address: str, port: int) -> socket.socket:
    """Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class Door:
    """Takes connections of ``listener``, which is its own from now on."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        welcome: Callable[[socket.socket], None],
        no_room: Callable[[OSError], None],
        entitled: str = "",
        stranger: Callable[[str], None] = lambda source: None,
    ) -> None:
        """``welcome`` is given each connection, to be closed by it. With ``entitled``, only those from that address; ``stranger`` is told
        the address of each other one.
        """
        self._socket = listener
        self._entitled = ip_address(entitled) if entitled else None
        self._welcome, self._stranger, self._no_room = welcome, stranger, no_room
        self._served = TokenBucket(PER_SECOND, AT_ONCE)
        self._strangers = TokenBucket(STRANGERS_PER_SECOND, STRANGERS_AT_ONCE)
        self._loop = asyncio.get_running_loop()
        self._timers: set[asyncio.TimerHandle] = set()
        self._filtered = False
        self._rests_until = 0.0
        self._penalty = FIRST_PENALTY
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _accept(self) -> None:
        for _ in range(ACCEPTED_A_TURN):
            try:
                connection, peer = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._no_room(error)
                self._pause(NO_ROOM)
                return
            if self._entitled is not None and ip_address(peer[0].partition("%")[0]) != self._entitled:
                self._turn_away(connection, str(peer[0]), self._entitled)
                continue
            connection.setblocking(False)
            self._welcome(connection)
            if wait := self._served.spend(1):
                self._pause(max(wait, PAUSE))
                return

    def _turn_away(self, connection: socket.socket, source: str, entitled: Address) -> None:
        # RST: nothing of it stays behind.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        if self._strangers.take() and not self._filtered:
            attach(self._socket, entitled)
            self._filtered = True
            self._later(FILTERED, self._unfilter)
        self._stranger(source)

    def punish(self) -> None:
        """No connection is taken for a while; twice as long the next time."""
        self._pause(self._penalty)
        self._penalty = min(2 * self._penalty, LONGEST_PENALTY)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._socket)
        self._rests_until = max(self._rests_until, self._loop.time() + seconds)
        self._later(seconds, self._resume)

    def _resume(self) -> None:
        if self._loop.time() >= self._rests_until - 0.001:
            self._loop.add_reader(self._socket, self._accept)

    def _unfilter(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        self._filtered = False

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            act()

        timer = self._loop.call_later(seconds, run)
        self._timers.add(timer)
