"""``python -m testbed``: check, build, up, down, save, status, ssh, clean."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from release.locked import LockError
from testbed.agent_disk import agent_disk
from testbed.bed import NUMBERS, PRISTINE, Testbed
from testbed.build import build, built, clean
from testbed.errors import TestbedError
from testbed.tools import require_machine, require_tools


def main() -> int:
    """The exit code."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.act(arguments) or 0)
    except (TestbedError, LockError, ValueError) as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m testbed", description="A real Xen host under QEMU.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("check", help="say whether this machine can carry a testbed; install the programs for it")
    one.set_defaults(act=_check)

    one = commands.add_parser("build", help="build the images, unless they are there")
    one.set_defaults(act=_build)

    one = commands.add_parser("up", help="start hosts from their saved state")
    one.add_argument("--name", default="default", help="of this testbed; several run at once")
    one.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="Xen hosts")
    one.add_argument("--grid", action="store_true", help="a host for the grid, too")
    one.add_argument("--state", default=PRISTINE, help="what to resume")
    one.add_argument(
        "--agent", type=Path, metavar="DEB", help="guests without a disk of their own have this package of the agent"
    )
    one.set_defaults(act=_up)

    one = commands.add_parser("down", help="end a testbed")
    one.add_argument("--name", default="default")
    one.set_defaults(act=_down)

    one = commands.add_parser("save", help="save a testbed's hosts as a state, and end it")
    one.add_argument("state")
    one.add_argument("--name", default="default")
    one.set_defaults(act=_save)

    one = commands.add_parser("status", help="say what is built and what runs")
    one.set_defaults(act=_status)

    one = commands.add_parser("ssh", help="a shell, or one command, on a host")
    one.add_argument("--name", default="default")
    one.add_argument("host", nargs="?", default="xen1", choices=tuple(NUMBERS))
    one.add_argument("command", nargs="*", help="after --")
    one.set_defaults(act=_ssh)

    one = commands.add_parser(
        "clean", help="remove images and saved hosts that are not of the present recipes, unless they are in use"
    )
    one.set_defaults(act=_clean)
    return parser


def _check(_: argparse.Namespace) -> None:
    require_machine()
    require_tools(install=True)


def _build(_: argparse.Namespace) -> None:
    print(build())


def _up(arguments: argparse.Namespace) -> None:
    hosts = [f"xen{number}" for number in range(1, arguments.hosts + 1)] + ["grid1"] * arguments.grid
    package: Path | None = arguments.agent
    if package is not None and not package.is_file():
        raise TestbedError(f"--agent {package}: there is no such file; 'make deb' puts the package into dist/")
    disk = None if package is None else agent_disk(build(), package)
    _show(Testbed.resume(arguments.name, hosts=hosts, state=arguments.state, guest_disk=disk))


def _down(arguments: argparse.Namespace) -> int:
    if Testbed.end(arguments.name):
        return 0
    print(f"testbed: no testbed '{arguments.name}' runs", file=sys.stderr)
    return 1


def _save(arguments: argparse.Namespace) -> None:
    _running(arguments.name).save(arguments.state)


def _status(_: argparse.Namespace) -> None:
    images = built()
    print(f"images: {images or 'not built'}")
    if images is not None:
        states = sorted(path.name for path in (images / "states").glob("*") if path.is_dir())
        print(f"states: {', '.join(states) or 'none'}")
    for name in Testbed.names():
        _show(_running(name))


def _ssh(arguments: argparse.Namespace) -> None:
    bed = _running(arguments.name)
    if arguments.host not in bed.hosts:
        raise TestbedError(f"testbed '{arguments.name}' has no host {arguments.host}")
    host = bed[arguments.host]
    options = () if arguments.command else ("-t",)
    os.execvp("ssh", [*host.ssh(*options), *arguments.command])  # noqa: S606


def _clean(_: argparse.Namespace) -> None:
    clean()


def _running(name: str) -> Testbed:
    bed = Testbed.running(name)
    if bed is None:
        raise TestbedError(f"no testbed '{name}' runs: python -m testbed up")
    return bed


def _show(bed: Testbed) -> None:
    for host in bed.hosts.values():
        state = "runs" if host.machine.running else "stopped"
        print(f"{bed.name}: {host.name} {state}; ssh -F {host.ssh_config} {host.name}")


if __name__ == "__main__":
    sys.exit(main())
