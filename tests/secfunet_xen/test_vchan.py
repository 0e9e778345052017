"""What is done with what libxenvchan hands out; the channel itself is tested on Xen."""

from __future__ import annotations

import asyncio
import ctypes
import os

import pytest

from secfunet.xen import vchan

FLAGS = 28  # offset in struct libxenvchan (libxenvchan.h): three pointers and a 32-bit port are before them
BLOCKING = 0x04


class Library:
    """Gives structures whose memory was used before, as malloc may, and a descriptor without an event."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(b"\xff" * 88, 88)
        self.descriptor = os.eventfd(0)
        self.state = 1
        self.closed = False

    def libxenvchan_server_init(self, *_: object) -> int:
        return ctypes.addressof(self.memory)

    libxenvchan_client_init = libxenvchan_server_init

    def libxenvchan_fd_for_select(self, _: int) -> int:
        return self.descriptor

    def libxenvchan_is_open(self, _: int) -> int:
        return self.state

    def libxenvchan_close(self, _: int) -> None:
        self.closed = True
        os.close(self.descriptor)


@pytest.mark.parametrize("end", ["server", "client"])
def test_no_call_waits_whatever_was_in_the_memory_of_the_channel(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    library = Library()
    monkeypatch.setattr(vchan, "_library", lambda: library)

    async def make() -> None:
        made = await (vchan.Vchan.serve(1, "/path") if end == "server" else vchan.Vchan.connect(0, "path"))
        flags = library.memory.raw[FLAGS]
        assert flags == 0xFF & ~BLOCKING
        assert not os.get_blocking(library.descriptor)
        await made.close()

    asyncio.run(make())


@pytest.mark.parametrize(
    ("end", "state", "closed"), [("client", 255, False), ("client", 0, True), ("server", 255, True)]
)
def test_a_guest_does_not_close_what_its_migration_took_away(
    monkeypatch: pytest.MonkeyPatch, end: str, state: int, closed: bool
) -> None:
    """Linux in the guest has a BUG there. A server does close: what it reads its client has written."""
    library = Library()
    monkeypatch.setattr(vchan, "_library", lambda: library)

    async def make() -> None:
        made = await (vchan.Vchan.serve(1, "/path") if end == "server" else vchan.Vchan.connect(0, "path"))
        library.state = state
        await made.close()
        await made.close()
        assert await made.read() == b""

    asyncio.run(make())
    assert library.closed is closed
