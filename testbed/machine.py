"""One QEMU: its command line, its monitor, its end.

Always software emulation: a KVM device that opens may still not run Xen. What makes Xen, libvirt and PVH guests work is written down here,
and nowhere else; a saved machine is only resumed with the same of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import TestbedError

# AMD's kind with nested paging: PVH guests need it. No SMAP: its emulation in QEMU 7.2 kills dom0.
CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand,+npt"
XEN_ARGUMENTS = "console=com1 com1=115200,8n1 noreboot dom0_mem=1536M,max:1536M dom0_max_vcpus=1"
LINUX_ARGUMENTS = "panic=-1 quiet mitigations=off"
MEMORY = {"xen": "3G", "grid": "1200M"}  # MEMORY of a kind of host
MONITOR_TIMEOUT = 300.0  # seconds: saving a machine writes its memory
STOP_TIMEOUT = 20.0


@dataclass(frozen=True)
class Plan:
    """What a machine is started from. ``kind``: ``xen`` or ``grid``. ``number``: in its addresses; ``cables``: (own port, switch's)."""

    kind: str
    number: int
    images: Path
    disk: Path
    run: Path  # a short folder for sockets and logs
    name: str
    ssh_port: int
    cables: tuple[tuple[int, int], ...]
    resume: str | None = None  # the snapshot in its disk

    @property
    def monitor(self) -> Path:
        return self.run / f"{self.name}.qmp"

    @property
    def console(self) -> Path:
        return self.run / f"{self.name}.console"

    def command(self) -> list[str]:
        """The command line of QEMU."""
        command = [
            *("qemu-system-x86_64", "-name", self.name, "-accel", "tcg,thread=single", "-cpu", CPU, "-smp", "1"),
            *("-m", MEMORY[self.kind], "-display", "none", "-no-user-config", "-nodefaults", "-machine", "pc"),
            *("-qmp", f"unix:{self.monitor.name},server=on,wait=off"),
            *("-chardev", f"file,id=console,path={self.console.name},append=on", "-serial", "chardev:console"),
            *self._kernel(),
            *("-drive", f"file={self.disk},if=none,id=disk0,format=qcow2,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=disk0"),
            *("-drive", f"file={self.images / 'guest.ext4'},if=none,id=disk1,format=raw,readonly=on"),
            *("-device", "virtio-blk-pci,drive=disk1"),
            *("-device", "virtio-rng-pci"),
            *("-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{self.ssh_port}-:22"),
            *("-device", f"virtio-net-pci,netdev=net0,romfile=,mac={self.mac(1)}"),
        ]
        for index, (own, switch) in enumerate(self.cables, start=1):
            command += [
                "-netdev",
                f"dgram,id=net{index},local.type=inet,local.host=127.0.0.1,local.port={own},"
                f"remote.type=inet,remote.host=127.0.0.1,remote.port={switch}",
                "-device",
                f"virtio-net-pci,netdev=net{index},romfile=,mac={self.mac(index + 1)}",
            ]
        if self.resume is not None:
            command += ["-loadvm", self.resume]
        else:
            command.append("-no-reboot")
        return command

    def mac(self, interface: int) -> str:
        """Of the first (ssh), second (management network) and third (LAN of the guests) interface."""
        # Saved with the machine: those of a second host that resumes from the same save are changed by ``host.settle``.
        return f"52:54:00:77:00:{interface:02x}"

    def _kernel(self) -> list[str]:
        linux = f"{LINUX_ARGUMENTS} console={'hvc0' if self.kind == 'xen' else 'ttyS0'}"
        initrd, vmlinux = self.images / "initrd-host", self.images / "vmlinux-host"
        if self.kind == "grid":
            return ["-kernel", str(vmlinux), "-initrd", str(initrd), "-append", linux]
        modules = f"{vmlinux} {linux},{initrd}"
        return ["-kernel", str(self.images / "xen.elf"), "-append", XEN_ARGUMENTS, "-initrd", modules]


class Machine:
    """A running QEMU, of this process or of an earlier one (``pid``)."""

    def __init__(self, plan: Plan, pid: int) -> None:
        self.plan = plan
        self.pid = pid

    @classmethod
    def start(cls, plan: Plan) -> Machine:
        """Raises TestbedError if QEMU ends at once."""
        for path in (plan.monitor, plan.console):
            path.unlink(missing_ok=True)
        log = plan.run / f"{plan.name}.qemu.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                plan.command(),
                cwd=plan.run,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        machine = cls(plan, process.pid)
        deadline = time.monotonic() + 60
        while not plan.monitor.exists():
            if process.poll() is not None:
                raise TestbedError(f"QEMU for {plan.name} ended with {process.returncode}:\n{_tail(log)}")
            if time.monotonic() > deadline:
                machine.kill()
                raise TestbedError(f"QEMU for {plan.name} did not begin within a minute")
            time.sleep(0.02)
        return machine

    @property
    def running(self) -> bool:
        """QEMU of this plan lives."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # of a child of ours, its end is to be asked for
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return str(self.plan.disk).encode() in b" ".join(words)

    def console_tail(self) -> str:
        """The last lines of its console."""
        return _tail(self.plan.console)

    def wait_for_console(self, word: str, *, timeout: float) -> None:
        """Returns once the console has a line with ``word``. Raises TestbedError."""
        deadline = time.monotonic() + timeout
        while True:
            text = self.plan.console.read_text(errors="replace") if self.plan.console.exists() else ""
            if word in text:
                return
            if not self.running:
                raise TestbedError(f"{self.plan.name} stopped while it booted:\n{self.console_tail()}")
            if time.monotonic() > deadline:
                raise TestbedError(f"{self.plan.name} was not up within {timeout:g} s:\n{self.console_tail()}")
            time.sleep(0.2)

    def monitor(self, *commands: str) -> str:
        """What QEMU's human monitor answers to the last of ``commands``. Raises TestbedError."""
        answer = ""
        try:
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(MONITOR_TIMEOUT)
                folder = os.open(self.plan.run, os.O_PATH)
                try:  # a path of any length
                    channel.connect(f"/proc/self/fd/{folder}/{self.plan.monitor.name}")
                finally:
                    os.close(folder)
                stream = channel.makefile("rwb")
                stream.readline()
                for execute, arguments in [
                    ("qmp_capabilities", {}),
                    *(("human-monitor-command", {"command-line": command}) for command in commands),
                ]:
                    stream.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
                    stream.flush()
                    while True:
                        line = stream.readline()
                        if not line:
                            raise TestbedError(f"QEMU of {self.plan.name} closed its monitor")
                        reply = json.loads(line)
                        if "error" in reply:
                            raise TestbedError(f"QEMU of {self.plan.name}: {reply['error'].get('desc')}")
                        if "return" in reply:
                            answer = str(reply["return"])
                            break
        except OSError as error:
            raise TestbedError(f"QEMU of {self.plan.name} does not answer: {error}") from error
        return answer

    def save(self, snapshot: str) -> None:
        """Saves the whole machine into its disk, and ends it. Raises TestbedError."""
        answer = self.monitor("stop", f"savevm {snapshot}")
        if answer.strip():
            raise TestbedError(f"{self.plan.name} cannot be saved: {answer.strip()}")
        self.kill()

    def kill(self) -> None:
        """At once; its disk is a copy that nobody needs any more."""
        if not self.running:
            return
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        while self.running:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.05)


def free_ports(count: int, kind: int = socket.SOCK_STREAM) -> Sequence[int]:
    """Ports of the loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, kind)) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _tail(path: Path, lines: int = 15) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
