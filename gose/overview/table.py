"""Tables with a title, and how latencies are written in them."""

from __future__ import annotations

from collections.abc import Iterable

from gose.running import Latency
from secfunet.service.tables import columns


def table(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A title and rows under their headers."""
    body = list(rows)
    if not body:
        return f"{title}: none"
    return f"{title}:\n" + "\n".join(f"  {line}" for line in columns(header, body).splitlines())


def duration(seconds: float) -> str:
    """Three digits, in the unit that fits: ``0.412 ms``, ``350 ms``, ``1.4 s``."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"


def latency(found: Latency | None) -> str:
    """``median / 99th percentile``."""
    return "-" if found is None else f"{duration(found.p50)} / {duration(found.p99)}"
