"""What commands print for people: columns of text, and times (RFC 3339, UTC)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their headers, without a final newline; the headers alone, if there are no rows."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def moment(seconds: float) -> str:
    """UTC seconds as ``2027-01-31T13:29:36Z``; a number that is no time as itself, 0 as ``-``."""
    if not seconds:
        return "-"
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"
