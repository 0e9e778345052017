"""``python -m demo``, as a user runs it: README shows what it prints, two do not meet in one folder, Ctrl-C ends it in order."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.processes import COMMANDS, run

ROOT = Path(__file__).parents[2]
PYTHON = COMMANDS / "python"
pytestmark = pytest.mark.e2e


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path that needs quoting in a shell."""
    path = Path(tempfile.mkdtemp(prefix="s f"))
    yield path
    shutil.rmtree(path)


def shape(line: str) -> str:
    """A line without what differs from run to run: times, numbers, identifiers."""
    line = re.sub(r" \(for another VM, just before\)", "", line)
    line = re.sub(r"\b[0-9a-f]{8,64}\b…?|\b[0-9a-f]+…", "ID", line)
    return re.sub(r"\d+(\.\d+)?", "N", line).strip()


def sample() -> list[str]:
    """What README shows of a run."""
    block = (ROOT / "README.md").read_text().split("$ make demo\n", 1)[1].split("```", 1)[0]
    return [shape(line) for line in block.splitlines() if line.strip(" …") and not line.startswith("setup:")]


async def test_the_demonstration_tells_the_story_of_the_readme(place: Path) -> None:
    told = await run(PYTHON, "-m", "demo", "--folder", place / "d", cwd=ROOT, timeout=110)
    text = told.output.decode()
    assert "Verified OK" in text
    assert text.count("refused (") == 4
    assert "\x1b" not in text
    assert "Traceback" not in told.errors
    printed = {shape(line) for line in text.splitlines()}
    assert [line for line in sample() if line not in printed] == []


@pytest.mark.walk
async def test_it_goes_on_until_ctrl_c_and_its_commands_work_when_copied(place: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(str(PYTHON), "-m", "demo", "--keep", "--folder", str(place / "d")),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    commands: list[str] = []
    async with asyncio.timeout(110):
        while not any("audit verify --config" in line for line in commands):
            line = (await process.stdout.readline()).decode()
            assert line, (await process.communicate())[1]
            commands += [line.strip()] if line.startswith(("  /", "  date")) else []
        signing = next(line for line in commands if line.startswith("date"))
        audit = commands[-1]
        for command in (signing, audit):
            shell = ("env", f"PATH={os.environ['PATH']}", "bash", "-c", command)
            await run(*shell, cwd=Path("/"))

        # Another one in the same folder is refused, and disturbs nothing.
        second = await run(PYTHON, "-m", "demo", "--folder", place / "d", cwd=ROOT, check=False)
        assert second.exit_code == 1
        assert f"already (pid {process.pid})" in second.errors
        await run("bash", "-c", signing, cwd=Path("/"))

        process.send_signal(signal.SIGINT)
        output, errors = await process.communicate()
    assert process.returncode == 0, errors
    assert "Everything is stopped" in output.decode()


@pytest.mark.walk
@pytest.mark.parametrize("after", [0.6, 2.0])
async def test_an_interruption_ends_every_process(place: Path, after: float) -> None:
    process = await asyncio.create_subprocess_exec(
        *(str(PYTHON), "-m", "demo", "--folder", str(place / "d")),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    await asyncio.sleep(after)
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode in {130, -signal.SIGINT}  # the latter: before it had begun
    assert b"Traceback" not in errors or process.returncode == -signal.SIGINT
    assert b"ended with" not in errors
    assert _processes_of(place) == []


def _processes_of(place: Path) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(place).encode() in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
