"""The release archive: what a host needs of the project, unpacked and compiled, to be put there by ``tar`` alone.

A virtual environment that uses the distribution's Python, with the project and the wheels that its places need, byte code beside every
module: a host needs neither pip nor a compiler nor a network, and its daemons never write where they may only read. The commands find
their environment beside themselves, so that it may lie anywhere, and one that runs stays with its own release when the link to the chosen
one moves. The same wheels give the same bytes; whoever deploys it names the release for their hash.
"""

from __future__ import annotations

import compileall
import gzip
import io
import py_compile
import re
import subprocess
import sys
import tarfile
import tempfile
from email.parser import Parser
from pathlib import Path

from release import ROOT
from release.locked import LockError
from release.wheels import own_wheel
from secfunet.service.files import write_atomically

PYTHON = (3, 11)  # Debian 12's; the wheels with compiled code are for this one alone
SITE = Path(f"lib/python{PYTHON[0]}.{PYTHON[1]}/site-packages")
COMMANDS = {"gose": "gose", "secure-element": "secure_element", "secure-middleware": "dom0_middleware"}
LEFTOVERS = ("RECORD", "REQUESTED", "INSTALLER", "direct_url.json")  # pip's, of this machine

COMMAND = """\
#!/bin/sh
'''exec' "$(dirname "$(readlink -f "$0")")/python3" -I "$(readlink -f "$0")" "$@"
' '''
from {room}.cli import main

main()
"""


class ArchiveError(Exception):
    """The archive cannot be made; the text says why."""


def build(out: Path, wheels: Path, suffix: str = "") -> Path:
    """Makes the archive in ``out`` from what ``release.wheels.collect`` put into ``wheels``. Raises ArchiveError or LockError."""
    if sys.version_info[:2] != PYTHON:
        raise ArchiveError(f"Python {PYTHON[0]}.{PYTHON[1]} is needed, the one of the hosts; this is {sys.version}")
    if not re.fullmatch(r"(\+[a-z0-9.]+)?", suffix):
        raise ArchiveError(f"a suffix of the version is + and then letters, digits and dots, not {suffix!r}")
    if not (wheels / "requirements.lock").is_file():
        raise ArchiveError(f"{wheels} has no requirements.lock: make the wheels first (python -m release wheels)")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sf-release-") as folder:
        stage = Path(folder) / "stage"
        site = stage / SITE
        site.mkdir(parents=True)
        _install(site, wheels, own_wheel(Path(folder)))
        version = _version(site) + suffix
        (stage / "VERSION").write_text(version + "\n", encoding="utf-8")
        _environment(stage)
        _compile(stage)
        archive = out / f"secfunet-release-{version}.tar.gz"
        write_atomically(archive, _packed(stage), mode=0o644)
        return archive


def _install(site: Path, wheels: Path, own: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--no-deps", "--no-index", "--target", str(site)]
    lock = str(wheels / "requirements.lock")
    for words in (["--require-hashes", "--find-links", str(wheels), "--requirement", lock], [str(own)]):
        finished = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise LockError(f"pip: {finished.stderr.strip() or finished.stdout.strip()}")
    for leftover in LEFTOVERS:
        for path in site.glob(f"*.dist-info/{leftover}"):
            path.unlink()
    for path in (site / "bin").glob("*"):
        path.unlink()
    (site / "bin").rmdir()


def _version(site: Path) -> str:
    (metadata,) = site.glob("secfunet-*.dist-info/METADATA")
    return str(Parser().parsestr(metadata.read_text(encoding="utf-8"))["Version"])


def _environment(stage: Path) -> None:
    """What makes the folder a virtual environment, and its commands."""
    version = f"{PYTHON[0]}.{PYTHON[1]}"
    (stage / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n", encoding="utf-8"
    )
    (stage / "bin").mkdir()
    (stage / "bin/python3").symlink_to(f"/usr/bin/python{version}")
    for name, room in COMMANDS.items():
        (stage / "bin" / name).write_text(COMMAND.format(room=room), encoding="utf-8")


def _compile(stage: Path) -> None:
    """Byte code that is never checked against its module: both come from the archive."""
    good = compileall.compile_dir(
        stage / "lib",
        quiet=1,
        stripdir=str(stage),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not good:
        raise ArchiveError("a module could not be compiled")


def _packed(stage: Path) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0, filename="") as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for path in sorted(stage.rglob("*")):
            archive.add(path, arcname=str(path.relative_to(stage)), recursive=False, filter=_plain)
    return packed.getvalue()


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Root's, without a time; only folders and commands may be executed."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = 0
    member.mode = 0o755 if member.isdir() or member.name.startswith("bin/") else 0o644
    return member
