"""``python -m release``: wheel, wheels, archive, deb."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from release import ROOT, archive, deb, wheels
from release.locked import LockError


def main() -> int:
    """The exit code; prints the path of what was made."""
    parser = argparse.ArgumentParser(prog="python -m release", description="Makes what is deployed.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for it")
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    commands.add_parser("wheel", help="the project's wheel")
    commands.add_parser("wheels", help="the wheels of its dependencies, into a folder 'wheels'")
    packed = commands.add_parser("archive", help="what the playbooks deploy, from the folder 'wheels'")
    packed.add_argument("--version-suffix", default="", help="such as +site1, for a build of one's own")
    package = commands.add_parser("deb", help="the agent's Debian package")
    package.add_argument("--kept", type=Path, default=ROOT / ".build/deb/wheels", help="folder that keeps wheels")
    package.add_argument("--version-suffix", default="", help="such as +site1, for a build of one's own")
    options = parser.parse_args()
    try:
        if options.what == "wheel":
            made = wheels.own_wheel(options.out)
        elif options.what == "wheels":
            made = options.out / "wheels"
            wheels.collect(made)
        elif options.what == "archive":
            made = archive.build(options.out, options.out / "wheels", options.version_suffix)
        else:
            made = deb.build(options.out, options.kept, options.version_suffix)
    except (archive.ArchiveError, deb.BuildError, LockError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
