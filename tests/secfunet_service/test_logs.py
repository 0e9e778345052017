"""What a program writes, and what it does not, whatever its callers do."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from secfunet.service.logs import BURST, FloodFilter, JsonFormatter


def record(message: str, level: int = logging.ERROR, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "asyncio", "levelno": level, "levelname": "ERROR", "msg": message, **extra})


def test_warnings_of_a_kind_are_a_burst_and_then_one_a_second() -> None:
    now = [0.0]
    dam = FloodFilter(lambda: now[0])
    same = [dam.filter(record(f"Exception in callback _SelectorTransport._accept <Handle {n}>")) for n in range(500)]
    assert sum(same) == BURST
    assert dam.filter(record("another kind"))
    assert all(dam.filter(record("as often as it is so", logging.INFO)) for _ in range(500))
    now[0] += 1.0
    last = record("Exception in callback _SelectorTransport._accept <Handle 501>")
    assert dam.filter(last)
    assert last.left_out == 500 - BURST  # type: ignore[attr-defined] # what the filter adds
    assert sum(dam.filter(record(f"{n:0100d}"[::-1])) for n in range(5000)) < 5000


def test_no_line_is_long() -> None:
    long = record("m" * 100_000, cause="c" * 100_000)
    long.exc_info = (ValueError, ValueError("v" * 100_000), None)
    line = JsonFormatter().format(long)
    assert len(line) < 12_000
    assert json.loads(line)["cause"] == "c" * 512 + "…"


@pytest.mark.parametrize(
    "module",
    [
        "gose.cli",
        "gose.server",
        "dom0_middleware.cli",
        "dom0_middleware.server",
        "vm_agent.cli",
        "vm_agent.server",
        "secure_element.cli",
        "gose_client.client",
    ],
)
def test_grpc_is_loaded_when_it_is_told_to_be_quiet(module: str) -> None:
    look = f"""
import os, sys
class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))
sys.meta_path.insert(0, Look())
import {module}
"""
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, env={}, check=True)
    assert done.stdout in ("", "NONE\n")
