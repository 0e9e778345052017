"""The lower side of a TLS-Tandem connection: a TCP (or Unix) socket whose bytes land directly in the core's buffer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from secfunet.tls.records import HEADER_LENGTH, MAX_CIPHERTEXT_TLS12

if TYPE_CHECKING:
    from secfunet.tandem.transport import TandemTransport

_ROOM_FOR_ONE = HEADER_LENGTH + MAX_CIPHERTEXT_TLS12
_PIECE = 64 * 1024


class Wire(asyncio.BufferedProtocol):
    """Passes everything on to its TandemTransport; stops reading while the core's buffer has no room for a record."""

    def __init__(self, upper: TandemTransport) -> None:
        self._upper = upper
        self._is_full = False
        self._dropped: bytearray | None = None
        self._may_drop = 0
        self.transport: asyncio.Transport | None = None
        self.is_write_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)
        self._upper.wire_made(self.transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio. There is always room: reading is paused before the buffer is full."""
        return self._upper.core.incoming.writable() if self._dropped is None else memoryview(self._dropped)

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        if self._dropped is not None:
            self._may_drop -= nbytes
            if self._may_drop < 0:
                self._upper.wire_dropped_enough()
            return
        self._upper.core.incoming.wrote(nbytes)
        self._upper.wire_received()
        self.check_room()

    def drop(self, limit: int) -> None:
        """Read on, to the peer's end or ``limit`` bytes, and keep nothing: a socket that is closed with unread bytes in it resets the
        connection, and what was sent last may never be seen."""
        self._dropped, self._may_drop = bytearray(_PIECE), limit
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def check_room(self) -> None:
        """Pause or resume reading by the room that is left."""
        if self.transport is None or self.transport.is_closing() or self._dropped is not None:
            return
        incoming = self._upper.core.incoming
        is_full = len(incoming) > incoming.capacity - 2 * _ROOM_FOR_ONE
        if is_full != self._is_full:
            self._is_full = is_full
            self.apply_reading()
        if is_full:
            self._upper.wire_full()

    def apply_reading(self) -> None:
        """Read exactly if there is room and the upper side wants data."""
        if self.transport is None or self.transport.is_closing() or self._dropped is not None:
            return
        if self._is_full or self._upper.is_wire_reading_paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        """See asyncio. The upper side decides when the socket is closed."""
        return self._upper.wire_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._upper.wire_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio."""
        self.is_write_paused = True
        self._upper.wire_write_paused()

    def resume_writing(self) -> None:
        """See asyncio."""
        self.is_write_paused = False
        self._upper.wire_write_resumed()
