"""A flood must not become a flood of the log.

What a caller can have refused at will is written at most once a second for each reason, and the line says how many there were since the
line before. What a caller chose (a path, a name) is cut and escaped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from secfunet.service.rate import TokenBucket

INTERVAL: Final = 1.0  # seconds between two lines for one reason
EXCERPT: Final = 100  # characters of a caller's text in a line
_FACT: Final = 300  # characters of one fact: the program's own words, with an excerpt of the caller's in them
MAX_REASONS: Final = 256  # beyond them all others count as one: nobody can invent reasons at will
_OTHER: Final = ""


class FloodLog:
    """Writes refusals to ``logger``. Reasons are few and the program's own words, never text of the caller."""

    def __init__(
        self, logger: logging.Logger | None = None, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Without ``logger`` only ``count`` can be used."""
        self._logger = logger
        self._monotonic = monotonic
        self._allowed: dict[str, TokenBucket] = {}
        self._unwritten: dict[str, int] = {}

    def count(self, reason: str, refused: int = 1) -> int:
        """Counts ``refused`` more. Returns the number that a line is to be written for now, earlier ones included; 0: write none."""
        if reason not in self._allowed:
            if len(self._allowed) >= MAX_REASONS:
                reason = _OTHER
            self._allowed.setdefault(reason, TokenBucket(1 / INTERVAL, 1, self._monotonic))
        pending = self._unwritten.pop(reason, 0) + refused
        if self._allowed[reason].take() > 0:
            self._unwritten[reason] = pending
            return 0
        return pending

    def warning(self, reason: str, message: str, extra: Mapping[str, object] | None = None, *, events: int = 1) -> None:
        """Writes ``message`` with ``extra`` (whose texts are cut and escaped), the reason, and in ``times`` the number of events since the
        line before, if a line may be written now."""
        self._write(logging.WARNING, reason, message, extra, exc_info=None, events=events)

    def error(self, reason: str, message: str, extra: Mapping[str, object] | None = None) -> None:
        """As warning(), one level up."""
        self._write(logging.ERROR, reason, message, extra, exc_info=None)

    def info(self, reason: str, message: str, extra: Mapping[str, object] | None = None) -> None:
        """As warning(), for what is in order but can be had at will: a connection opened, a session cut."""
        self._write(logging.INFO, reason, message, extra, exc_info=None)

    def exception(
        self,
        reason: str,
        message: str,
        extra: Mapping[str, object] | None = None,
        *,
        error: BaseException | None = None,
    ) -> None:
        """With the traceback of ``error`` (None: the one that is handled): for a fault of the program that a caller can set off again."""
        self._write(logging.ERROR, reason, message, extra, exc_info=error if error is not None else True)

    def _write(
        self,
        level: int,
        reason: str,
        message: str,
        extra: Mapping[str, object] | None,
        *,
        exc_info: bool | BaseException | None,
        events: int = 1,
    ) -> None:
        if self._logger is None:
            raise RuntimeError("this FloodLog has no logger")
        if not self._logger.isEnabledFor(level) or not (times := self.count(reason, events)):
            return
        facts: dict[str, object] = {
            key: excerpt(value, _FACT) if isinstance(value, str) else value for key, value in (extra or {}).items()
        }
        self._logger.log(level, message, exc_info=exc_info, extra={"reason": reason, **facts, "times": times})


def excerpt(untrusted: object, limit: int = EXCERPT) -> str:
    """The text of ``untrusted``, at most ``limit`` characters of it, without control characters: for a line of the log."""
    text = str(untrusted)
    cut = text[:limit]
    if not cut.isprintable():
        cut = "".join(
            one if one.isprintable() else one.encode("unicode_escape", "backslashreplace").decode() for one in cut
        )
    return cut if len(text) <= limit else f"{cut}…"
