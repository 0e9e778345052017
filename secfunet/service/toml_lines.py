"""Where a key stands in a TOML file, for messages: tomllib reads values and forgets lines.

Only what settings files are made of is followed: tables, arrays of tables, keys. A value in an inline table or a list is at its key's line.
"""

from __future__ import annotations

import re
from typing import Final

Location = tuple[str | int, ...]

_PART: Final = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED: Final = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER: Final = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?")
_KEY: Final = re.compile(rf"\s*({_DOTTED})\s*=")
_PARTS: Final = re.compile(_PART)


class TomlLines:
    """The lines of a text, which need not be valid."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Location, int] = {}
        table: Location = ()
        counts: dict[Location, int] = {}
        quotes = ""
        for number, line in enumerate(text.splitlines(), start=1):
            if quotes:
                if quotes in line:
                    quotes = ""
                continue
            header = _HEADER.match(line)
            if header is not None:
                table = self._table(_parts(header[2]), counts, is_array=header[1] == "[[")
                self._lines.setdefault(table, number)
                continue
            key = _KEY.match(line)
            if key is not None:
                location = table
                for part in _parts(key[1]):
                    location = (*location, part)
                    self._lines.setdefault(location, number)
                quotes = _unclosed(line[key.end() :])

    def line_of(self, location: Location) -> int | None:
        """The line of a key or table, or of the nearest one that it lies in; counted from 1. None: nothing of it stands in the file."""
        while location:
            if location in self._lines:
                return self._lines[location]
            location = location[:-1]
        return None

    @staticmethod
    def _table(parts: list[str], counts: dict[Location, int], *, is_array: bool) -> Location:
        location: Location = ()
        for index, part in enumerate(parts):
            location = (*location, part)
            if is_array and index == len(parts) - 1:
                counts[location] = counts.get(location, -1) + 1
            if location in counts:
                location = (*location, counts[location])
        return location


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in _PARTS.findall(dotted)]


def _unclosed(value: str) -> str:
    """The quotes of a text that goes on behind this line."""
    for quotes in ('"""', "'''"):
        if value.count(quotes) % 2:
            return quotes
    return ""
