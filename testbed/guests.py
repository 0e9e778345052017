"""Guests on a host: domain XML, and a way in.

A domain is PV or true PVH: ``<type machine='xenpvh'>linux</type>`` is accepted by libvirt and starts PV silently, so ``kind_inside`` asks
the guest's own kernel.
"""

from __future__ import annotations

import base64
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import TestbedError
from testbed.host import Host, Result, run_by_ssh

READY_TIMEOUT = 600.0  # seconds; ten to twenty on a quiet machine
CONSOLE = "/var/log/xen/console/guest-{name}.log"
SHARED_DISK = "/dev/vdb"

_TYPES = {"pv": ("xenpv", "linux"), "pvh": ("xenpvh", "xenpvh")}


def domain_template(
    *,
    kind: str = "pvh",
    disk: str | None = None,
    interface: bool = True,
    script: str = "",
    arguments: str = "",
) -> str:
    """The XML that a host's Secure Middleware makes domains from; ``${name}`` and its like are filled in by it.

    ``kind``: ``pv`` or ``pvh``. ``disk``: a raw image, each domain's own (may contain ``${name}``); None: the shared disk, read only, with
    memory above it. ``script``: shell commands that the guest runs before it is ready; their output goes to its console.
    """
    machine, system = _TYPES[kind]
    words = ["console=hvc0", "quiet", "rodata=off", "mitigations=off", "testbed.name=${name}", arguments]
    if interface:
        words.append("testbed.ip=${address}")
    if script:
        words.append(f"testbed.script={base64.b64encode(script.encode()).decode()}")
    if disk is None:
        words.append("testbed.root=overlay")
        source = f"<disk type='block' device='disk'><driver name='phy'/><source dev='{SHARED_DISK}'/>"
        source += "<target dev='xvda' bus='xen'/><readonly/><shareable/></disk>"
    else:
        source = f"<disk type='file' device='disk'><driver name='phy'/><source file='{disk}'/>"
        source += "<target dev='xvda' bus='xen'/></disk>"
    network = ""
    if interface:
        network = "<interface type='bridge'><mac address='${mac}'/><source bridge='xenbr0'/>"
        network += "<script path='/etc/xen/scripts/vif-testbed'/></interface>"
    return f"""\
<domain type='xen'>
  <os>
    <type arch='x86_64' machine='{machine}'>{system}</type>
    <kernel>/boot/guest-vmlinux</kernel>
    <initrd>/boot/guest-initrd</initrd>
    <cmdline>{" ".join(word for word in words if word)}</cmdline>
  </os>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {source}
    {network}
    <console type='pty'><target type='xen' port='0'/></console>
  </devices>
</domain>
"""


def own_domain(name: str, uuid: str, address: str, mac: str, *, memory_mib: int = 256, **choices: str) -> str:
    """The XML of a domain that somebody starts by hand, without the middleware."""
    text = domain_template(**choices)  # type: ignore[arg-type]
    for word, value in {"${name}": name, "${uuid}": uuid, "${address}": address, "${mac}": mac}.items():
        text = text.replace(word, value)
    head = f"<name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>"
    return text.replace("<domain type='xen'>", f"<domain type='xen'>{head}", 1)


@dataclass(frozen=True)
class Guest:
    """A domain of this name on ``host``, with ``address`` in the guests' LAN ("" if it has no interface)."""

    host: Host
    name: str
    address: str = ""

    @property
    def domain_id(self) -> int:
        """Raises TestbedError if it does not run."""
        return int(self.host.run(f"xl domid {shlex.quote(self.name)}").text)

    def wait_until_ready(self, *, timeout: float = READY_TIMEOUT) -> None:
        """Returns when the guest has said so. Raises TestbedError with the end of its console."""
        path = f"/local/domain/$(xl domid {shlex.quote(self.name)})/data/testbed-ready"
        try:
            self.host.wait_for(f"xenstore-read {path}", timeout=timeout)
        except TestbedError as error:
            raise TestbedError(f"{error}\n{self.console()[-2000:]}") from None

    def wait_until_gone(self, *, timeout: float = READY_TIMEOUT) -> None:
        """Returns when Xen has no domain of this name. Raises TestbedError."""
        self.host.wait_for(f"! xl domid {shlex.quote(self.name)} >/dev/null 2>&1", timeout=timeout)

    def ssh(self, *options: str) -> list[str]:
        """The command line that reaches the guest, through its host."""
        return ["ssh", "-F", str(self.host.ssh_config), "-J", self.host.name, *options, self.address]

    def run(self, command: str, *, data: bytes = b"", timeout: float = 300, check: bool = True) -> Result:
        """A shell command in the guest. Raises TestbedError."""
        return run_by_ssh(self.name, self.ssh(), command, data=data, timeout=timeout, check=check)

    def hang_up(self) -> None:
        """Ends the shared ssh connection: the guest is about to go, or was another one."""
        subprocess.run(self.ssh("-O", "exit"), capture_output=True, check=False)

    def wait_for(self, command: str, *, timeout: float = 300, pause: float = 0.5) -> Result:
        """The result of ``command`` in the guest once it succeeds. Raises TestbedError."""
        deadline = time.monotonic() + timeout
        while True:
            result = self.run(command, check=False, timeout=timeout)
            if result.code == 0:
                return result
            if time.monotonic() > deadline:
                said = (result.stderr + result.stdout).decode(errors="replace")[-2000:]
                raise TestbedError(f"{self.name}: '{command}' did not succeed within {timeout:g} s\n{said}")
            time.sleep(pause)

    def put(self, local: Path, remote: str) -> None:
        """A file of this machine, into the guest."""
        self.run(f"cat >{shlex.quote(remote)}", data=local.read_bytes())

    def console(self) -> str:
        """Everything that the guest's console said so far, of earlier domains of the name, too."""
        return self.host.run(f"cat {CONSOLE.format(name=self.name)}", check=False).text

    def kind_inside(self) -> str:
        """``pv`` or ``pvh``, by what the guest's own kernel found. Raises TestbedError if it is neither."""
        said = self.run("dmesg").text
        if "Booting kernel on Xen PVH" in said or "Xen PVH" in said:
            return "pvh"
        if "Hypervisor detected: Xen PV" in said:
            return "pv"
        raise TestbedError(f"{self.name} does not say what kind of domain it is")
