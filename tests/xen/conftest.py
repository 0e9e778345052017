"""Fixtures of the tests on Xen, and the table at the end that says what ran, what could not, and how long it took.

Modules may run side by side (pytest-xdist): each has hosts of its own. What they share is made by one worker while the others wait.
"""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from testbed import Testbed, TestbedError
from testbed.tools import require_machine, require_tools
from tests.xen.deployment import GRID, HOST, HOSTS, ROOT, Release, deployed_state, make_release
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import Vm

HERE = Path(__file__).parent
Made = TypeVar("Made")
_steps: list[tuple[str, str, float, str]] = []
_fixtures: list[tuple[str, float]] = []
_BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--state", help="of the testbed: resume it instead of deploying this checkout (for work on tests)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xen)
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """A short folder: Unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="sfx-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def release() -> Release:
    """The hosts' archive, the agent's package, and a guest's disk, of this checkout."""
    try:
        require_machine()
        require_tools(install=True)
    except TestbedError as error:
        pytest.exit(f"the tests on Xen cannot run here: {error}", returncode=4)
    return _timed("the release: archive, package, guest's disk", lambda: make_release(ROOT / "dist"), shared=True)


@pytest.fixture(scope="session")
def deployed(request: pytest.FixtureRequest, release: Release, work: Path) -> str:
    """The state of the testbed in which this checkout is deployed."""
    if chosen := request.config.getoption("--state"):
        return str(chosen)
    return _timed("deployment by the playbooks, or its saved state", lambda: deployed_state(release, work), shared=True)


@pytest.fixture(scope="module")
def bed(request: pytest.FixtureRequest, deployed: str, release: Release) -> Iterator[Testbed]:
    """A deployed host and its grid, fresh for each module."""
    name = str(request.module.__name__).rpartition(".test_")[2].replace("_", "-")[:16]
    made = _timed(
        f"{name}: resumed",
        lambda: Testbed.resume(name, hosts=HOSTS, state=deployed, guest_disk=release.guest_disk),
    )
    with made:
        yield made


@pytest.fixture(scope="module")
def orchestrator(bed: Testbed, work: Path) -> Iterator[Orchestrator]:
    with Orchestrator(bed[HOST], work) as made:
        yield made


@pytest.fixture(scope="module")
def make_vm(bed: Testbed, orchestrator: Orchestrator, work: Path) -> Iterator[Callable[..., Vm]]:
    """Makes a VM of this name, with this number in its address; more as ``Vm.make`` takes it."""
    with ExitStack() as stack:

        def make(name: str, number: int, **more: int) -> Vm:
            vm = Vm.make(name, number, grid=bed[GRID], host=bed[HOST], orchestrator=orchestrator, folder=work, **more)
            stack.callback(vm.guest.hang_up)
            return vm

        yield make


def _timed(what: str, make: Callable[[], Made], *, shared: bool = False) -> Made:
    with ExitStack() as stack:
        if shared:
            (ROOT / "dist").mkdir(exist_ok=True)
            fcntl.flock(stack.enter_context((ROOT / "dist" / "xen.lock").open("w")), fcntl.LOCK_EX)
        begin = time.monotonic()
        made = make()
        _fixtures.append((what, time.monotonic() - begin))
    return made


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["on Xen"] = _fixtures


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _fixtures.extend(getattr(node, "workeroutput", {}).get("on Xen", ()))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/xen/" not in report.nodeid:
        return
    if report.when == "call" or report.outcome != "passed":
        why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        name = report.nodeid.removeprefix("tests/xen/test_").replace(".py::test_", ": ").replace("_", " ")
        _steps.append((name, report.outcome, report.duration, why.removeprefix("Skipped: ")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _steps:
        return
    terminalreporter.section("on Xen")
    for what, seconds in _fixtures:
        terminalreporter.write_line(f"{seconds:7.1f} s           {what}")
    words = {"passed": "ok", "failed": "FAILED", "skipped": "NOT RUN"}
    for name, outcome, seconds, why in _steps:
        terminalreporter.write_line(f"{seconds:7.1f} s  {words[outcome]:8} {name}{f' ({why})' if why else ''}")
    terminalreporter.write_line(f"{time.monotonic() - _BEGAN:7.1f} s  in all")
