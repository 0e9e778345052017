"""Whether an agent is connected, and since when: a state, beside its right to be (``GuestDomain.enrolled``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

BLINK = 5.0  # seconds: an agent that is back sooner (with a new certificate, over a new connection) was not away


class Presence:
    """Of the agent of one run. ``since``: UTC seconds, when it came or went."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._streams = 0
        self._came: float | None = None  # the last time that it came, if it ever did
        self.since = clock()

    @property
    def connected(self) -> bool:
        return self._streams > 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """It holds a stream open, while the context lasts."""
        if not self._streams:
            now = self._clock()
            self.since = self._came = self._came if self._came is not None and now - self.since < BLINK else now
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            if not self._streams:
                self.since = self._clock()
