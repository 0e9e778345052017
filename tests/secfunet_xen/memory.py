"""A channel in memory: what ``Vchan`` is, without Xen."""

from __future__ import annotations

import asyncio

from secfunet.xen.errors import VchanError


class MemoryChannel:
    """One end; ``size`` bytes may be on their way in each direction, as in a ring."""

    def __init__(self, size: int = 16384) -> None:
        self.size = size
        self.peer: MemoryChannel | None = None
        self.ring = bytearray()
        self.changed = asyncio.Condition()
        self.closed = False
        self.abandoned = False
        self.silent = False  # what is written here is lost, as after a migration

    @classmethod
    def pair(cls, size: int = 16384) -> tuple[MemoryChannel, MemoryChannel]:
        one, other = cls(size), cls(size)
        one.peer, other.peer = other, one
        return one, other

    async def read(self) -> bytes:
        async with self.changed:
            await self.changed.wait_for(lambda: self.ring or self.closed)
            data = bytes(self.ring)
            self.ring.clear()
            self.changed.notify_all()
            return data

    async def write(self, data: bytes) -> None:
        assert self.peer is not None
        view = memoryview(data)
        while view and not self.silent:
            async with self.peer.changed:
                await self.peer.changed.wait_for(lambda: len(self.peer.ring) < self.size or self.peer.closed)  # type: ignore[union-attr]
                if self.peer.closed or self.closed:
                    raise VchanError("the channel is closed")
                room = self.size - len(self.peer.ring)
                self.peer.ring += view[:room]
                view = view[room:]
                self.peer.changed.notify_all()

    async def accepted(self) -> None:
        return

    async def close(self) -> None:
        for end in (self, self.peer):
            assert end is not None
            end.closed = True
            async with end.changed:
                end.changed.notify_all()

    def abandon(self) -> None:
        self.abandoned = True
