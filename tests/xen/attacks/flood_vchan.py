"""Floods the guest's own vchan, one way after the other; then comes and goes, and keeps the pages of every channel mapped.

``flood_vchan.py SECONDS WHAT...``: each WHAT for so many seconds or until dom0 ends the channel; its agent must not run. WHAT is one of:

    pong empty credit dropped openreset bytes storm scribble garbage       frames, events, or whatever, for ever
    keep                                                                  new channels, none of them unmapped, until there are no more
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, count, repeat
from typing import Any

from secfunet.xen import VCHAN_PATH
from secfunet.xen.libraries import load
from secfunet.xen.vchan import PACKAGE

HELLO, OPEN, DATA, CREDIT, RESET, PONG = 1, 2, 3, 4, 6, 8
CLIENT_LIVE = 20  # offset in struct vchan_interface
PATIENCE = 150.0  # seconds for dom0 to make the next channel


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">BBHI", kind, 0, len(payload), stream) + payload


def pairs() -> Iterator[bytes]:
    for number in count(1):
        yield frame(OPEN, number, b"enrol") + frame(RESET, number, b"\2")


def frames(what: str) -> Iterator[bytes]:
    opened = [frame(OPEN, 1, b"agent")]
    ways: dict[str, Callable[[], Iterator[bytes]]] = {
        "pong": lambda: repeat(frame(PONG) * 512),
        "empty": lambda: chain(opened, repeat(frame(DATA, 1) * 512)),
        "credit": lambda: chain(opened, repeat(frame(CREDIT, 1, bytes(4)) * 256)),
        "dropped": lambda: chain(opened, [frame(RESET, 1, b"\2")], repeat(frame(DATA, 1, b"x") * 256)),
        "bytes": lambda: chain(opened, repeat(frame(DATA, 1, b"\x16") * 256)),
        "openreset": pairs,
        "garbage": lambda: repeat(os.urandom(4096)),
        "storm": lambda: repeat(b""),
        "scribble": lambda: repeat(b""),
    }
    return ways[what]()


def library() -> Any:
    lib = load("xenvchan", PACKAGE)
    handle, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    for name, result, arguments in (
        ("client_init", handle, [handle, number, ctypes.c_char_p]),
        ("write", number, [handle, handle, size]),
        ("read", number, [handle, handle, size]),
        ("is_open", number, [handle]),
    ):
        function = getattr(lib, f"libxenvchan_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


class Head(ctypes.Structure):
    """The public beginning of struct libxenvchan."""

    _fields_ = (
        ("grants", ctypes.c_void_p),
        ("ring", ctypes.c_void_p),
        ("event", ctypes.c_void_p),
        ("event_port", ctypes.c_uint32),
        ("is_server", ctypes.c_int, 1),
        ("server_persist", ctypes.c_int, 1),
        ("blocking", ctypes.c_int, 1),
    )


class Channel:
    """Never unmapped."""

    def __init__(self, lib: Any, handle: int) -> None:
        self._lib, self._handle = lib, handle
        self.head = Head.from_address(handle)
        self.head.blocking = 0
        self._room = ctypes.create_string_buffer(65536)
        self.sent = 0

    @property
    def is_open(self) -> bool:
        return bool(self._lib.libxenvchan_is_open(self._handle) == 1)

    def put(self, data: bytes, until: float) -> bool:
        """False once it is closed, or the time is over."""
        while self.is_open and time.monotonic() < until:
            self._lib.libxenvchan_read(self._handle, self._room, len(self._room))
            written = self._lib.libxenvchan_write(self._handle, data, len(data)) if data else 0
            if written < 0:
                return False
            self.sent += written
            data = data[written:]
            if not data:
                return True
        return False

    def byte(self, offset: int, value: int) -> None:
        ctypes.cast(ctypes.c_void_p(self.head.ring), ctypes.POINTER(ctypes.c_ubyte))[offset] = value


def opened(lib: Any, patience: float) -> Channel | None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if handle := lib.libxenvchan_client_init(None, 0, VCHAN_PATH.encode()):
            return Channel(lib, handle)
        time.sleep(0.2)
    return None


def flood(channel: Channel, what: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    if what != "garbage" and not channel.put(frame(HELLO, 0, b"SFXM\x01"), until):
        return
    notify = None
    if what == "storm":
        notify = load("xenevtchn", "libxenevtchn1").xenevtchn_notify
        notify.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    for piece in frames(what):
        if what == "scribble":
            for offset, value in enumerate(os.urandom(16)):
                channel.byte(offset, value)
        if notify is not None:
            for _ in range(200):
                notify(channel.head.event, channel.head.event_port)
        if not channel.put(piece, until) or time.monotonic() >= until:
            return


def main(seconds: float, *ways: str) -> dict[str, object]:
    lib = library()
    told: dict[str, object] = {}
    kept = []
    for what in ways:
        if what == "keep":
            while (channel := opened(lib, 60)) is not None:
                kept.append(channel)
                channel.put(frame(HELLO, 0, b"SFXM\x01"), time.monotonic() + 5)
                time.sleep(0.2)
                channel.byte(CLIENT_LIVE, 0)  # "gone"
            told["kept"] = len(kept)
            continue
        if (channel := opened(lib, PATIENCE)) is None:
            told[what] = "no channel"
            continue
        kept.append(channel)
        begin = time.monotonic()
        flood(channel, what, seconds)
        told[what] = {"sent": channel.sent, "ended": not channel.is_open, "seconds": round(time.monotonic() - begin, 1)}
        channel.byte(CLIENT_LIVE, 0)
    return told


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), *sys.argv[2:])), flush=True)
    time.sleep(600)  # what is mapped stays mapped
