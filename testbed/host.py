"""A host of a testbed, reached by ssh as root."""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import TestbedError
from testbed.machine import Machine

COMMAND_TIMEOUT = 300.0  # seconds; the machine below is slow and shared
LIBVIRT_UUID = "5ec0f07e-7e57-4bed-8000-0000000000"


@dataclass(frozen=True)
class Result:
    """What a command said, and its exit code."""

    stdout: bytes
    stderr: bytes
    code: int

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace").strip()


class Host:
    """``name`` is ``xen1``, ``xen2`` or ``grid1``; ``address`` is the one in the management network."""

    def __init__(self, name: str, number: int, machine: Machine, key: Path) -> None:
        self.name = name
        self.number = number
        self.machine = machine
        self.key = key
        self.ssh_port = machine.plan.ssh_port

    @property
    def address(self) -> str:
        return f"192.168.78.{self.number}"

    @property
    def ssh_config(self) -> Path:
        """For ``ssh -F`` and Ansible: this host by its name, over one shared connection."""
        return self.machine.plan.run / "ssh_config"

    def ssh(self, *options: str) -> list[str]:
        """The command line that reaches this host."""
        return ["ssh", "-F", str(self.ssh_config), *options, self.name]

    def run(self, command: str, *, data: bytes = b"", timeout: float = COMMAND_TIMEOUT, check: bool = True) -> Result:
        """A shell command on the host. Raises TestbedError if it fails (with ``check``) or does not end in time."""
        return run_by_ssh(self.name, self.ssh(), command, data=data, timeout=timeout, check=check)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """A command that goes on; whoever starts it ends it. Its standard input is kept open."""
        return subprocess.Popen(
            [*self.ssh(), "--", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def put(self, local: Path, remote: str, *, mode: int | None = None) -> None:
        """A file or a folder, as ``remote``."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(local, arcname="x", filter=_as_root)
        target = shlex.quote(remote)
        change = f" && chmod {mode:o} {target}" if mode is not None else ""
        self.run(
            f"set -e; t=$(mktemp -d -p $(dirname {target})); tar -C $t -xf -; rm -rf {target}; mv $t/x {target}; rmdir $t{change}",
            data=packed.getvalue(),
        )

    def write(self, remote: str, content: bytes | str, *, mode: int = 0o600) -> None:
        """A file with this content."""
        data = content.encode() if isinstance(content, str) else content
        target = shlex.quote(remote)
        self.run(f"umask 077; mkdir -p $(dirname {target}); cat >{target} && chmod {mode:o} {target}", data=data)

    def get(self, remote: str) -> bytes:
        """A file's content."""
        return self.run(f"cat {shlex.quote(remote)}").stdout

    def wait_for(self, command: str, *, timeout: float = COMMAND_TIMEOUT, pause: float = 0.5) -> Result:
        """The result of ``command`` once it succeeds. Raises TestbedError."""
        deadline = time.monotonic() + timeout
        while True:
            result = self.run(command, check=False, timeout=timeout)
            if result.code == 0:
                return result
            if time.monotonic() > deadline:
                said = (result.stderr + result.stdout).decode(errors="replace").strip()[-2000:]
                raise TestbedError(f"{self.name}: '{_short(command)}' did not succeed within {timeout:g} s\n{said}")
            time.sleep(pause)

    def reachable(self) -> bool:
        """It answers by ssh."""
        try:
            return self.run("true", check=False, timeout=30).code == 0
        except TestbedError:
            return False

    def wait_until_reachable(self, *, timeout: float) -> None:
        """Raises TestbedError."""
        deadline = time.monotonic() + timeout
        while not self.reachable():
            if not self.machine.running:
                raise TestbedError(f"{self.name} stopped:\n{self.machine.console_tail()}")
            if time.monotonic() > deadline:
                raise TestbedError(f"{self.name} did not answer within {timeout:g} s:\n{self.machine.console_tail()}")
            time.sleep(0.2)

    def hang_up(self) -> None:
        """Ends the shared ssh connection: the host is about to go."""
        subprocess.run(self.ssh("-O", "exit"), capture_output=True, check=False)

    def reboot(self, *, timeout: float) -> None:
        """At once, as after a power failure, but with its disk written; returns when it answers again. Raises TestbedError."""
        ask = "cat /proc/sys/kernel/random/boot_id"
        boot = self.run(ask).text
        self.run("sync; nohup sh -c 'sleep 1; systemctl reboot --force --force' >/dev/null 2>&1 &")
        deadline = time.monotonic() + timeout
        while True:
            # A connection that was made before the end is never told of it: each question gets a connection of its own, and little time.
            self.hang_up()
            try:
                answer = self.run(ask, check=False, timeout=30)
            except TestbedError:
                answer = None
            if answer is not None and answer.code == 0 and answer.text != boot:
                break
            if time.monotonic() > deadline:
                raise TestbedError(f"{self.name} did not boot within {timeout:g} s:\n{self.machine.console_tail()}")
            time.sleep(1)
        self.set_clock()

    def set_clock(self) -> None:
        """A resumed host lives in the past."""
        self.run(f"date -s @{time.time():.3f} >/dev/null")

    def become(self, number: int, *, name: str) -> None:
        """Gives a host that is the twin of ``xen1`` an identity of its own."""
        self.run(
            f"""set -e
echo {name} >/etc/hostname; hostname {name}; echo number={number} >/etc/testbed
sed -i s/.$/{number:x}/ /etc/machine-id
for path in /sys/class/net/*; do
    read -r mac <$path/address
    case $mac in
        52:54:00:77:00:02) management=${{path##*/}} ;;
        52:54:00:77:00:03) lan=${{path##*/}} ;;
    esac
done
ip addr flush dev $management; ip addr flush dev xenbr0
ip link set $management address 52:54:00:77:{number:02x}:02
ip link set $lan address 52:54:00:77:{number:02x}:03
ip link set xenbr0 address 52:54:00:77:ff:{number:02x}
ip addr add 192.168.78.{number}/24 dev $management; ip addr add 192.168.77.{number}/24 dev xenbr0
sed -i 's/^host_uuid.*/host_uuid = "{LIBVIRT_UUID}{number:02x}"/' /etc/libvirt/libvirtd.conf
[ ! -e /proc/xen/capabilities ] || systemctl restart libvirtd.service
ip -4 -o addr show dev $management | grep -q 192.168.78.{number}/24
""",
            timeout=300,
        )

    def accept_migrations(self) -> None:
        """Lets libvirt of the other hosts send domains here, over the management network alone and without a password."""
        sockets = "libvirtd.socket libvirtd-ro.socket"
        self.run(
            f"""set -e
mkdir -p /etc/systemd/system/libvirtd-tcp.socket.d
printf '[Socket]\nListenStream=\nListenStream={self.address}:16509\nFreeBind=yes\n' >/etc/systemd/system/libvirtd-tcp.socket.d/testbed.conf
systemctl daemon-reload
systemctl stop libvirtd.service {sockets}
systemctl start libvirtd-tcp.socket {sockets} libvirtd.service
"""
        )


def run_by_ssh(
    name: str, ssh: Sequence[str], command: str, *, data: bytes = b"", timeout: float, check: bool = True
) -> Result:
    """A shell command where ``ssh`` leads to. Raises TestbedError if it fails (with ``check``) or does not end in time."""
    try:
        done = subprocess.run([*ssh, "--", command], input=data, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")[-2000:]
        raise TestbedError(f"{name}: '{_short(command)}' did not end within {timeout:g} s: {said}") from None
    result = Result(done.stdout, done.stderr, done.returncode)
    if check and done.returncode != 0:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()[-3000:]
        raise TestbedError(f"{name}: '{_short(command)}' ended with {done.returncode}\n{said}")
    return result


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _short(command: str) -> str:
    line = " ".join(command.split())
    return line if len(line) <= 120 else f"{line[:117]}..."
