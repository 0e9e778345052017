"""The Debian package of the agent.

What is in it: a virtual environment below /usr/lib/secfunet/vm-agent that uses the distribution's Python, with the agent and the wheels
that requirements.lock names for it (their hashes are held to), compiled; and what lies in ``packaging/deb/tree``. Nothing is fetched or
compiled when it is installed. The package depends on nothing but its sources: the same commit gives the same bytes (SOURCE_DATE_EPOCH,
by default the time of the last commit, stands in every time stamp).
"""

from __future__ import annotations

import compileall
import gzip
import hashlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from release import ROOT
from release.locked import entries, fetch, needed
from release.wheels import own_wheel
from secfunet.service.files import write_atomically

SOURCES = ROOT / "packaging" / "deb"
PACKAGE = "secfunet-vm-agent"
PYTHON = (3, 11)  # Debian 12's; the wheels with compiled code are for this one alone
HOME = Path("usr/lib/secfunet/vm-agent")
SITE = HOME / f"lib/python{PYTHON[0]}.{PYTHON[1]}/site-packages"
# Of our own wheel; a guest needs no other, and of the protocols only these.
ROOMS = ("secfunet", "vm_agent")
PROTOCOLS = {"__init__.py", "py.typed", "container.py", "errors.py", "identity.py", "operation.py"}
PROTOCOLS |= {"agent", "gose", "middleware", "rpc", "service", "xen"}
UNNEEDED = {"joserfc"}  # tokens are read in dom0 and in the grid
COMPILE_TIME = ("*.pyi", "*.h", "*.pyx", "*.pxd")
COMPRESSION = ("-Zxz", "--threads-max=1")  # more threads give other bytes

CONTROL = """\
Package: {package}
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: {depends}
Section: admin
Priority: optional
Description: agent of a virtual machine whose private key is elsewhere
 Lets the programs of a Xen guest sign and decrypt with a private key that is
 in a secure element of a grid, and never in the guest. The agent asks the
 Secure Middleware in dom0, over a channel that the hypervisor keeps from other
 domains (vchan) or over the bridge.
 .
 The package carries the Python libraries that the agent needs, in exactly the
 versions it was tested with, apart from those of the system.
"""


class BuildError(Exception):
    """The package cannot be built; the text says why."""


def build(out: Path, wheels: Path, suffix: str = "", *, compression: Sequence[str] = COMPRESSION) -> Path:
    """Builds the package into ``out``; ``compression`` is dpkg-deb's. Raises BuildError or LockError."""
    if sys.version_info[:2] != PYTHON:
        raise BuildError(f"Python {PYTHON[0]}.{PYTHON[1]} is needed, the one of the guests; this is {sys.version}")
    if not re.fullmatch(r"(\+[a-z0-9.+]+)?", suffix):
        raise BuildError(f"a suffix of the version is + and then letters, digits and dots, not {suffix!r}")
    epoch = source_date()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sf-deb-") as folder:
        stage = Path(folder) / "stage"
        shutil.copytree(SOURCES / "tree", stage)
        install_wheels(stage, wheels, Path(folder))
        version = installed_version(stage) + suffix
        finish_documents(stage, version, epoch)
        compile_modules(stage)
        depends = dependencies(stage, Path(folder))
        set_modes(stage)
        write_control(stage, version, depends)
        for path in sorted(stage.rglob("*"), reverse=True):
            os.utime(path, (epoch, epoch), follow_symlinks=False)
        os.utime(stage, (epoch, epoch))
        package = out / f"{PACKAGE}_{version}_{architecture()}.deb"
        unfinished = Path(folder) / package.name
        command = ["dpkg-deb", "--root-owner-group", *compression, "--build", str(stage), str(unfinished)]
        run(command, environment={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)})
        write_atomically(package, unfinished.read_bytes(), mode=0o644)
        return package


def source_date() -> int:
    """SOURCE_DATE_EPOCH, by default the time of the last commit; seconds."""
    given = os.environ.get("SOURCE_DATE_EPOCH") or run(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]).strip()
    if not given.isdecimal():
        raise BuildError("this is no checkout with a commit: set SOURCE_DATE_EPOCH")
    return int(given)


def install_wheels(stage: Path, wheels: Path, work: Path) -> None:
    """Makes the virtual environment: the locked wheels, and our own without the rooms that a guest does not need."""
    locked = entries(ROOT / "requirements.lock", needed("secfunet", frozenset({"agent"})) - UNNEEDED)
    fetch(locked, wheels)
    requirements = work / "locked.txt"
    requirements.write_text("\n".join(locked.values()) + "\n", encoding="utf-8")
    site = stage / SITE
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    install += ["--no-deps", "--no-index", "--target", str(site)]
    run([*install, "--require-hashes", "--find-links", str(wheels), "--requirement", str(requirements)])
    run([*install, str(own_wheel(work))])
    kept = {*ROOMS, *(path.name for path in site.iterdir() if not (ROOT / path.name / "__init__.py").exists())}
    for path in site.iterdir():
        if path.name not in kept or path.name == "bin":
            shutil.rmtree(path)
    for path in (site / "secfunet").iterdir():
        if path.name not in PROTOCOLS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pattern in COMPILE_TIME:
        for path in site.rglob(pattern):
            path.unlink()
    for leftover in ("RECORD", "REQUESTED", "INSTALLER", "direct_url.json"):  # pip's, of this machine
        for path in site.glob(f"*.dist-info/{leftover}"):
            path.unlink()
    (stage / HOME / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON[0]}.{PYTHON[1]}\n", encoding="utf-8"
    )
    (stage / HOME / "bin").mkdir()
    (stage / HOME / "bin/python3").symlink_to(f"../../../../bin/python{PYTHON[0]}.{PYTHON[1]}")


def installed_version(stage: Path) -> str:
    """The version that the agent says it has, as Debian orders versions: 1.0rc1 comes before 1.0."""
    (metadata,) = (stage / SITE).glob("secfunet-*.dist-info/METADATA")
    version = str(Parser().parsestr(metadata.read_text(encoding="utf-8"))["Version"])
    return re.sub(r"(?<=\d)\.?(a|b|rc|dev)(?=\d)", r"~\1", version)


def finish_documents(stage: Path, version: str, epoch: int) -> None:
    """Changelog, the licences of what is carried, and the compressed man page."""
    documents = stage / "usr/share/doc" / PACKAGE
    stamp = run(["date", "-R", "-u", "-d", f"@{epoch}"]).strip()
    changes = f"{PACKAGE} ({version}) stable; urgency=medium\n\n  * See CHANGELOG.md of SecFuNet.\n\n -- {maintainer()}  {stamp}\n"
    write_gzip(documents / "changelog.gz", changes.encode())
    for page in (stage / "usr/share/man").rglob("*.[1-8]"):
        write_gzip(page.with_name(page.name + ".gz"), page.read_bytes())
        page.unlink()
    carried = []
    for metadata in sorted((stage / SITE).glob("*.dist-info/METADATA"), key=lambda path: path.parent.name.lower()):
        fields = Parser().parsestr(metadata.read_text(encoding="utf-8"))
        classifiers = [text for text in fields.get_all("Classifier", []) if text.startswith("License ::")]
        named = fields["License-Expression"] or next(iter(classifiers), "see its files").rpartition(" :: ")[2]
        carried.append(f"{fields['Name']} {fields['Version']}: {named}; /{metadata.parent.relative_to(stage)}")
    template = documents / "copyright"
    template.write_text(template.read_text(encoding="utf-8").replace("@CARRIED@", "\n".join(carried)), encoding="utf-8")


def write_gzip(path: Path, content: bytes) -> None:
    """Without a name and a time stamp."""
    path.write_bytes(gzip.compress(content, 9, mtime=0))


def compile_modules(stage: Path) -> None:
    """Byte code beside every module, as the paths of the guest; never checked against the module, dpkg puts both there."""
    good = compileall.compile_dir(
        stage / HOME / "lib",
        quiet=1,
        stripdir=str(stage),
        prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not good:
        raise BuildError("a module could not be compiled")


def dependencies(stage: Path, work: Path) -> str:
    """Depends: what the compiled libraries link with (dpkg-shlibdeps finds it), Python, and what the agent loads when it needs it."""
    libraries = sorted(str(path) for path in (stage / SITE).rglob("*.so*"))
    (work / "debian").mkdir()
    (work / "debian/control").write_text(
        f"Source: {PACKAGE}\n\nPackage: {PACKAGE}\nArchitecture: any\n", encoding="utf-8"
    )
    found = run(["dpkg-shlibdeps", "-O", "--warnings=0", *(f"-e{name}" for name in libraries)], folder=work)
    major, minor = PYTHON
    parts = [
        *re.sub(r"^shlibs:Depends=", "", found.strip(), flags=re.MULTILINE).split(", "),
        f"python3 (>= {major}.{minor})",
        f"python3 (<< {major}.{minor + 1})",
        "libxenstore4",
        "libxenmisc4.17 | libxenmisc4.20",  # libxenvchan
        "systemd | systemd-sysusers",
    ]
    return ", ".join(sorted(part for part in parts if part))


def set_modes(stage: Path) -> None:
    """Folders 0755, files 0644; programs keep their right to be executed, libraries and modules have none."""
    stage.chmod(0o755)
    for path in stage.rglob("*"):
        if not path.is_symlink():
            program = path.is_dir() or path.parent == stage / "usr/bin"
            path.chmod(0o755 if program else 0o644)


def write_control(stage: Path, version: str, depends: str) -> None:
    """DEBIAN/: control, conffiles, md5sums, maintainer scripts."""
    files = sorted(path for path in stage.rglob("*") if path.is_file() and not path.is_symlink())
    sums = "".join(f"{md5(path)}  {path.relative_to(stage)}\n" for path in files)
    conffiles = "".join(f"/{path.relative_to(stage)}\n" for path in files if path.is_relative_to(stage / "etc"))
    control = stage / "DEBIAN"
    shutil.copytree(SOURCES / "control", control)
    control.chmod(0o755)
    for script in control.iterdir():
        script.chmod(0o755)
    fields = {
        "package": PACKAGE,
        "version": version,
        "architecture": architecture(),
        "maintainer": maintainer(),
        "size": -(-sum(path.stat().st_size for path in files) // 1024),
        "depends": depends,
    }
    for name, text in (("control", CONTROL.format_map(fields)), ("conffiles", conffiles), ("md5sums", sums)):
        (control / name).write_text(text, encoding="utf-8")
        (control / name).chmod(0o644)


def md5(path: Path) -> str:
    """As debsums(1) wants it; it finds damage, it protects from nobody."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def architecture() -> str:
    """Debian's name of this machine's architecture."""
    return run(["dpkg", "--print-architecture"]).strip()


def maintainer() -> str:
    """Who built it: DEBFULLNAME and DEBEMAIL, as Debian's tools take them."""
    return (
        f"{os.environ.get('DEBFULLNAME', 'SecFuNet')} <{os.environ.get('DEBEMAIL', 'secfunet@localhost.localdomain')}>"
    )


def run(command: list[str], *, folder: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command. Raises BuildError with what it said on standard error."""
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise BuildError(f"{' '.join(command[:4])} …: {finished.stderr.strip() or finished.stdout.strip()}")
    return finished.stdout
