"""The table's arithmetic, and the command as ``make bench`` calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.rows import Row, number, table, to_json


def test_ratio_and_aims() -> None:
    limit = Row.of("limit", "1/s", [90.0, 100.0, 300.0])
    assert (limit.median, limit.min, limit.max) == (100.0, 90.0, 300.0)
    good = Row.of("good", "1/s", [60.0]).against(limit).at_least(0.5)
    bad = Row.of("bad", "1/s", [40.0]).against(limit).at_least(0.5)
    assert good.aim is not None
    assert good.aim.met
    assert bad.aim is not None
    assert str(bad.aim) == "MISSED by 10.0% points: at least 50% of 'limit'"
    slow = Row.of("slow", "ms", [7.5]).below(5)
    assert slow.aim is not None
    assert str(slow.aim) == "MISSED by 2.50 ms: below 5 ms"
    with pytest.raises(ValueError, match="no aim"):
        limit.at_least(1)


def test_table_and_json_have_the_same_rows() -> None:
    limit = Row.of("limit", "1/s", [1000.0])
    rows = [limit, Row.of("half", "1/s", [500.0]).against(limit).at_least(0.9)]
    text = table(rows, ["chain: it did not start"])
    assert "aim MISSED" in text
    assert "not measured: chain: it did not start" in text
    assert "1,000" in text
    kept = json.loads(to_json(rows, []))
    assert kept["rows"][1]["compared_with"] == "limit"
    assert kept["rows"][1]["ratio"] == 0.5
    assert kept["rows"][1]["aim"]["met"] is False


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (12345.6, 100, 99.94, 1.2345, 0.012345)] == [
        "12,346",
        "100",
        "99.9",
        "1.23",
        "0.0123",
    ]


def test_the_command_writes_rows_for_a_machine(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "limits", "--json", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = json.loads(file.read_text())["rows"]
    assert [row["unit"] for row in rows] == ["1/s", "1/s"]
    assert all(row["min"] <= row["median"] <= row["max"] for row in rows)
    assert rows[0]["name"] in finished.stdout
