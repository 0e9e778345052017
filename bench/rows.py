"""Rows of the table, and the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Aim:
    """What a row should reach; ``reached`` is in the unit that ``text`` speaks of."""

    text: str
    met: bool
    missed_by: str = ""

    def __str__(self) -> str:
        return f"met: {self.text}" if self.met else f"MISSED by {self.missed_by}: {self.text}"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured thing: median, smallest and largest of its rounds, and the row of the same run that it is compared with."""

    name: str
    unit: str
    median: float
    min: float
    max: float
    compared_with: str = ""
    ratio: float | None = None
    aim: Aim | None = field(default=None)

    @classmethod
    def of(cls, name: str, unit: str, samples: Sequence[float]) -> Row:
        """The row of these rounds."""
        return cls(name, unit, statistics.median(samples), min(samples), max(samples))

    def against(self, other: Row) -> Row:
        """This row with its ratio to ``other``."""
        return replace(self, compared_with=other.name, ratio=self.median / other.median if other.median else None)

    def at_least(self, share: float) -> Row:
        """With the aim that the ratio be at least ``share``."""
        if self.ratio is None:
            raise ValueError("a row without a ratio has no aim for it")
        text = f"at least {share:.0%} of '{self.compared_with}'"
        return replace(self, aim=Aim(text, self.ratio >= share, f"{share - self.ratio:.1%} points"))

    def at_most(self, factor: float) -> Row:
        """With the aim that the ratio be at most ``factor``."""
        if self.ratio is None:
            raise ValueError("a row without a ratio has no aim for it")
        text = f"at most {factor:g} times '{self.compared_with}'"
        return replace(self, aim=Aim(text, self.ratio <= factor, f"{self.ratio - factor:.2f} times"))

    def below(self, bound: float) -> Row:
        """With the aim that the median be below ``bound``."""
        text = f"below {bound:g} {self.unit}"
        return replace(self, aim=Aim(text, self.median < bound, f"{self.median - bound:.2f} {self.unit}"))


def to_json(rows: Sequence[Row], problems: Sequence[str]) -> str:
    """For a machine: ``rows`` (name, unit, median, min, max, compared_with, ratio, aim) and what was not measured."""
    return json.dumps({"rows": [asdict(row) for row in rows], "not_measured": list(problems)}, indent=1) + "\n"


def table(rows: Sequence[Row], problems: Sequence[str]) -> str:
    """For a person."""
    heads = ("", "unit", "median", "min", "max", "ratio", "of")
    lines = [
        (
            row.name,
            row.unit,
            number(row.median),
            number(row.min),
            number(row.max),
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            row.compared_with,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (heads, *lines)) for column in range(len(heads))]
    texts = [_line(heads, widths), "  ".join("-" * width for width in widths)]
    for row, line in zip(rows, lines, strict=True):
        texts.append(_line(line, widths))
        if row.aim is not None:
            texts.append(f"    aim {row.aim}")
    texts += [f"not measured: {problem}" for problem in problems]
    return "\n".join(texts)


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    sides = [
        cell.rjust(width) if column in (2, 3, 4, 5) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(sides).rstrip()
