"""What a transport was given to send and the socket has not taken yet."""

from __future__ import annotations

import collections
from typing import Final

CHUNK: Final = 256 * 1024
"""Most plaintext that is protected for one socket write: 16 records."""

Data = bytes | bytearray | memoryview


class WriteQueue:
    """Bytes in order, given out in pieces of at most ``CHUNK``. Small writes that waited leave in common pieces."""

    def __init__(self) -> None:
        self._waiting: collections.deque[memoryview] = collections.deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, data: Data) -> None:
        """Put at the end. What may change after this call is copied."""
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        self._waiting.append(view)
        self._size += len(view)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._size = 0

    def take(self) -> memoryview:
        """The next piece. There must be one."""
        head = self._waiting.popleft()
        if len(head) > CHUNK:
            self._waiting.appendleft(head[CHUNK:])
            head = head[:CHUNK]
        elif self._waiting and len(head) < CHUNK // 16:
            head = self._join(head)
        self._size -= len(head)
        return head

    def _join(self, head: memoryview) -> memoryview:
        pieces, size = [head], len(head)
        while self._waiting and size + len(self._waiting[0]) <= CHUNK:
            piece = self._waiting.popleft()
            pieces.append(piece)
            size += len(piece)
        return memoryview(b"".join(pieces))
