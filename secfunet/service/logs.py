"""Logs: one JSON object a line on standard error (a person's terminal gets plain lines). No secret is ever handed to a logger."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from secfunet.service.flood_log import MAX_REASONS
from secfunet.service.rate import TokenBucket

MAX_TEXT: Final = 512  # characters of one text in a line
MAX_TRACEBACK: Final = 8192
BURST: Final = 20  # warnings of one kind at once
_KIND: Final = 40  # characters of a message that say what kind it is

_STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time (UTC, RFC 3339), level, logger, message, and whatever was passed in ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage(), 2 * MAX_TEXT),
        }
        entry.update({key: _cut(value) for key, value in record.__dict__.items() if key not in _STANDARD})
        if record.exc_info:
            entry["exception"] = _cut(self.formatException(record.exc_info), MAX_TRACEBACK)
        return json.dumps(entry, default=str, ensure_ascii=False)


class FloodFilter(logging.Filter):
    """The last dam: warnings and errors of one kind, libraries' own included, are at most a burst and then one a second.

    What a caller can set off at will has a FloodLog where it is written, which counts; here it is for what nobody thought of.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._monotonic = monotonic
        self._kinds: dict[str, TokenBucket] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        if record.levelno < logging.WARNING:
            return True
        kind = f"{record.name} {str(record.msg)[:_KIND]}"
        if kind not in self._kinds:
            if len(self._kinds) >= MAX_REASONS:
                kind = ""
            self._kinds.setdefault(kind, TokenBucket(1.0, BURST, self._monotonic))
        if self._kinds[kind].take() > 0:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if left_out := self._left_out.pop(kind, 0):
            record.left_out = left_out
        return True


def _cut(value: object, limit: int = MAX_TEXT) -> object:
    return f"{value[:limit]}…" if isinstance(value, str) and len(value) > limit else value


def configure_logs(level: str = "info", *, plain: bool | None = None) -> None:
    """Sends the logs of this process to standard error; ``plain`` None means: plain lines if that is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    if plain if plain is not None else sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    else:
        handler.setFormatter(JsonFormatter())
    handler.addFilter(FloodFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
