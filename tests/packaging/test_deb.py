"""The agent's Debian package: what is in it and what is not, that what is in it is enough, and that a commit gives the same bytes again.

How it behaves when it is installed is seen in a real guest: ``tests/xen/test_guest.py``.
"""

from __future__ import annotations

import configparser
import hashlib
import re
import subprocess
import tomllib
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from release.deb import HOME, PACKAGE, ROOMS, SITE, UNNEEDED, BuildError, build
from release.locked import needed
from secfunet import __version__

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".build" / "deb" / "wheels"
QUICK = ("-Zgzip", "-z1")
UNIT = "lib/systemd/system/secfunet-vm-agent.service"
CONFFILE = "etc/secfunet/vm-agent.toml"
pytestmark = pytest.mark.timeout(900)  # a build takes some 20 seconds where nothing else runs


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("deb"), WHEELS, compression=QUICK)


@pytest.fixture(scope="module")
def tree(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed; DEBIAN/ has what dpkg keeps."""
    root = tmp_path_factory.mktemp("tree") / "root"
    subprocess.run(["dpkg-deb", "--raw-extract", package, root], check=True)
    return root


@pytest.fixture(scope="module")
def control(tree: Path) -> Message:
    return Parser().parsestr((tree / "DEBIAN/control").read_text(encoding="utf-8"))


def test_it_depends_on_what_the_system_has(control: Message, package: Path) -> None:
    assert (control["Package"], control["Version"]) == (PACKAGE, __version__)
    assert package.name == f"{PACKAGE}_{__version__}_{control['Architecture']}.deb"
    depends = str(control["Depends"]).split(", ")
    assert {"python3 (>= 3.11)", "python3 (<< 3.12)", "libxenstore4", "libxenmisc4.17 | libxenmisc4.20"} <= set(depends)
    libraries = {text.partition(" ")[0] for text in depends}
    assert libraries <= {"libc6", "libgcc-s1", "libstdc++6", "libxenmisc4.17", "libxenstore4", "python3", "systemd"}
    assert "python3-pip" not in libraries


def test_only_what_a_guest_needs_is_in_it(tree: Path) -> None:
    installed = {path.relative_to(tree).parts[0] for path in tree.iterdir()} - {"DEBIAN"}
    assert installed == {"etc", "lib", "usr"}
    site = tree / SITE
    rooms = {path.name for path in site.iterdir() if (ROOT / path.name / "__init__.py").exists()}
    assert rooms == set(ROOMS)
    names = {re.sub(r"-[0-9].*", "", path.name).replace("_", "-").lower() for path in site.glob("*.dist-info")}
    assert names == (needed("secfunet", frozenset({"agent"})) - UNNEEDED) | {"secfunet"}
    suffixes = {path.suffix for path in site.rglob("*") if path.is_file()}
    assert not suffixes & {".pyi", ".h", ".pyx", ".c", ".rs", ".whl"}
    assert not [path for path in tree.rglob("*") if path.name in ("tests", "RECORD", "direct_url.json", "INSTALLER")]


def test_what_is_in_it_is_enough(tree: Path) -> None:
    """Every module of the agent, with the system's Python and nothing from elsewhere."""
    modules = sorted(path.stem for path in (tree / SITE / "vm_agent").glob("*.py") if path.stem != "__init__")
    modules = [f"vm_agent.{name}" for name in modules]
    modules += [f"secfunet.xen.{name}" for name in ("guest_end", "multiplex", "vchan", "xenstore")]
    program = f"import sys; sys.path.insert(0, {str(tree / SITE)!r})\nimport {', '.join(modules)}\n"
    program += "from vm_agent.cli import app\nfor words in (['--help'], ['--version'], ['sign', '--help'], ['status', '--help']):\n"
    program += "    app(words, standalone_mode=False)\n"
    program += "print('joserfc' in sys.modules, [n for n, m in sys.modules.items() if '/.venv/' in str(getattr(m, '__file__', ''))])"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", program], capture_output=True, text=True, env={}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False []"


def test_every_module_is_compiled_for_its_place(tree: Path) -> None:
    sources = list((tree / SITE).rglob("*.py"))
    assert sources
    for path in sources:
        compiled = path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc"
        assert compiled.exists(), compiled
        assert compiled.read_bytes()[4:8] == b"\1\0\0\0"  # PEP 552: by hash, not checked
    assert (
        f"/{SITE}/vm_agent/cli.py".encode() in (tree / SITE / "vm_agent/__pycache__/cli.cpython-311.pyc").read_bytes()
    )


def test_modes_and_owners(package: Path, tree: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        mode, owner, *_, path = line.split(" -> ")[0].split()
        assert owner == "root/root", line
        if mode[0] == "d":
            assert mode == "drwxr-xr-x", line
        elif mode[0] == "-":
            assert mode == ("-rwxr-xr-x" if path == "./usr/bin/vm-agent" else "-rw-r--r--"), line
        else:
            assert (mode[0], path) == ("l", f"./{HOME}/bin/python3"), line
    for script in ("postinst", "prerm", "postrm"):
        assert (tree / "DEBIAN" / script).stat().st_mode & 0o777 == 0o755
        subprocess.run(["sh", "-n", tree / "DEBIAN" / script], check=True)


def test_sums_and_conffiles(tree: Path, control: Message) -> None:
    assert (tree / "DEBIAN/conffiles").read_text() == f"/{CONFFILE}\n"
    sums = dict(reversed(line.split("  ", 1)) for line in (tree / "DEBIAN/md5sums").read_text().splitlines())
    files = [
        path
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink() and tree / "DEBIAN" not in path.parents
    ]
    assert sums.keys() == {str(path.relative_to(tree)) for path in files}
    for path in files:
        assert sums[str(path.relative_to(tree))] == hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    assert int(control["Installed-Size"]) * 1024 >= sum(path.stat().st_size for path in files)


def test_the_documents_that_debian_asks_for(tree: Path) -> None:
    """Policy 12.5, 12.7 and 12.1: copyright, changelog, and a page for each program."""
    documents = tree / "usr/share/doc" / PACKAGE
    carried = (documents / "copyright").read_text(encoding="utf-8")
    for metadata in (tree / SITE).glob("*.dist-info/METADATA"):
        name = Parser().parsestr(metadata.read_text(encoding="utf-8"))["Name"]
        assert f"{name} " in carried
    assert (documents / "changelog.gz").exists()
    assert [path.name for path in (tree / "usr/share/man/man1").iterdir()] == ["vm-agent.1.gz"]


def test_the_settings_that_it_brings_are_read(tree: Path) -> None:
    fields = tomllib.loads((tree / CONFFILE).read_text(encoding="utf-8"))
    assert fields == {
        "join": "xenstore",
        "state": "/run/secfunet/state",
        "socket": "/run/secfunet/agent.sock",
        "group": "secfunet-vm",
    }


def test_the_unit_names_what_is_there(tree: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((tree / UNIT).read_text(encoding="utf-8"))
    service = unit["Service"]
    assert unit["Unit"]["ConditionVirtualization"] == "xen"
    assert "network-pre.target" in unit["Unit"]["Before"]
    assert (service["Type"], service["CapabilityBoundingSet"], service["ProtectSystem"]) == ("notify", "", "strict")
    assert int(service["WatchdogSec"]) <= 60
    program = service["ExecStart"].split()[0]
    assert (tree / program.lstrip("/")).exists()
    users = (tree / "usr/lib/sysusers.d/secfunet-vm-agent.conf").read_text()
    assert re.search(rf"^u {service['User']} ", users, re.MULTILINE)
    verified = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(tree / UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout[-2000:]


def test_the_same_sources_give_the_same_bytes(package: Path, tmp_path: Path) -> None:
    assert build(tmp_path, WHEELS, compression=QUICK).read_bytes() == package.read_bytes()


def test_a_suffix_that_is_no_part_of_a_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="suffix"):
        build(tmp_path, WHEELS, "-1 evil")
