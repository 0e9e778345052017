"""A grid's settings file in a folder of its own, and the command ``gose`` as a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Gose = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gose(tmp_path: Path) -> Gose:
    """Runs ``gose`` with these arguments on ``gose.toml`` of the test's folder."""
    config = tmp_path / "gose.toml"
    config.touch()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gose.cli", *arguments, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run
