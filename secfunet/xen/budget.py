"""What one guest may have dom0 do for it over its channel, in time: dom0 reads no faster than this, and ends a channel that does nothing.

A guest can always write: to copy frames into a ring costs it less than it costs dom0 to look at them. So frames and bytes are read at
a bounded rate, whatever they are; an honest agent comes nowhere near. Frames that change nothing, and streams that are given up, have
bounds of their own, beyond which the channel ends: an honest agent sends a handful of them in a day.

One budget serves all channels of a run, one after the other: a guest that comes again finds what it has left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from secfunet.service.rate import TokenBucket
from secfunet.xen.errors import BudgetError

FRAMES_A_TURN: Final = 64
"""Frames of one channel that are acted on before every other task of the loop has had its turn."""
FRAMES_PER_SECOND: Final = 4096
FRAMES_AT_ONCE: Final = 8192
FRAMES_OF_AN_OPEN: Final = 64
"""What an OPEN counts for: a task, a socket, a connection of the service behind it."""
BYTES_PER_SECOND: Final = 16 << 20
BYTES_AT_ONCE: Final = 32 << 20
IDLE_PER_SECOND: Final = 16
IDLE_AT_ONCE: Final = 1024
"""Frames without effect: a ring's worth (2048 of the smallest frames) is more."""
RESETS_PER_SECOND: Final = 2
RESETS_AT_ONCE: Final = 64


class Budget:
    """Of one guest. ``monotonic``: seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._frames = TokenBucket(FRAMES_PER_SECOND, FRAMES_AT_ONCE, monotonic)
        self._bytes = TokenBucket(BYTES_PER_SECOND, BYTES_AT_ONCE, monotonic)
        self._idle = TokenBucket(IDLE_PER_SECOND, IDLE_AT_ONCE, monotonic)
        self._resets = TokenBucket(RESETS_PER_SECOND, RESETS_AT_ONCE, monotonic)

    def spend(self, frames: int, opens: int, size: int) -> float:
        """For what was read: ``frames`` of which ``opens`` open a stream, ``size`` bytes. The seconds until more is to be read."""
        return max(self._frames.spend(frames + opens * (FRAMES_OF_AN_OPEN - 1)), self._bytes.spend(size))

    def idle(self) -> None:
        """For a frame that changes nothing. Raises BudgetError beyond the bound."""
        if self._idle.take():
            raise BudgetError("the guest floods its channel with frames that change nothing")

    def reset(self) -> None:
        """For a stream that the peer opened and gave up before it had ended. Raises BudgetError beyond the bound."""
        if self._resets.take():
            raise BudgetError("the guest opens streams and gives them up, again and again")
