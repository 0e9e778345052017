"""One distribution for every place: its wheel has the generated stubs, and each place imports only what its extra brings."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from release.wheels import own_wheel

ROOT = Path(__file__).parents[2]

# What an import is called, and the distribution that brings it.
DISTRIBUTIONS = {
    "OpenSSL": "pyopenssl",
    "aiohttp": "aiohttp",
    "grpc_reflection": "grpcio-reflection",
    "h11": "h11",
    "libvirt": "libvirt-python",
    "pyrad": "pyrad",
    "service_identity": "service-identity",
}
PLACES = {
    "agent": ("vm_agent.cli", "vm_agent.daemon"),
    "card": ("secure_element.cli",),
    "gose": ("gose.cli", "gose.server"),
    "dom0": ("dom0_middleware.cli", "dom0_middleware.grid", "dom0_middleware.libvirt_hypervisor"),
}
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is not installed in this place")
sys.meta_path.insert(0, Blocker())
{imports}
"""


def extra_requirements(extra: str) -> set[str]:
    """The distributions that ``secfunet[extra]`` brings beside those that every place has."""
    found = set()
    for text in requires("secfunet") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            found.add(requirement.name.lower())
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_place_needs_no_more_than_its_extra(place: str) -> None:
    here = extra_requirements(place)
    blocked = {module for module, distribution in DISTRIBUTIONS.items() if distribution not in here}
    assert blocked
    program = BLOCKER.format(blocked=sorted(blocked), imports="\n".join(f"import {module}" for module in PLACES[place]))
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr


def test_the_wheel_has_every_package_and_the_stubs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("secfunet-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for proto in (ROOT / "protos").rglob("*.proto"):
        stub = proto.relative_to(ROOT / "protos").with_suffix("")
        assert {f"{stub}_pb2.py", f"{stub}_pb2.pyi", f"{stub}_pb2_grpc.py"} <= names
    packages = {name.partition("/")[0] for name in names if not name.startswith("secfunet-")}
    assert packages == {"secfunet", "secure_element", "gose", "gose_client", "dom0_middleware", "vm_agent"}


def test_two_that_release_at_once_get_a_whole_wheel_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        wheels = list(pool.map(lambda _: own_wheel(tmp_path), range(3)))
    assert len(set(wheels)) == 1
    assert zipfile.ZipFile(wheels[0]).testzip() is None
    assert [path.name for path in tmp_path.iterdir()] == [wheels[0].name]


def test_generated_code_is_not_committed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not [name for name in tracked if "_pb2" in name]


def test_the_lock_has_an_exact_version_with_hashes_for_everything() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "http" not in lock.replace("aiohttp", "")
    entries = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert all("==" in line for line in entries)
    assert lock.count("--hash=sha256:") >= len(entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    locked = {line.partition("==")[0].lower() for line in entries}
    assert {Requirement(text).name.lower() for text in wanted} - {"secfunet"} <= locked
