"""Hosts that belong together: made from saved ones in seconds, and thrown away.

A *state* is a set of saved hosts. ``pristine`` is made by booting each kind of host once; others are what ``save`` made of a bed. A bed
never writes to a state: it runs on copies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from secfunet.service.lock import process_lock
from testbed import places
from testbed.build import build
from testbed.errors import TestbedError
from testbed.host import Host
from testbed.machine import Machine, Plan, free_ports
from testbed.tools import require_tools, run

NUMBERS = {"xen1": 1, "xen2": 2, "grid1": 10}
PRISTINE = "pristine"  # as a user names it; the folder also has a digest of what makes it
SNAPSHOT = "saved"
BOOT_TIMEOUT = 600.0  # seconds; some twenty on a quiet machine
RESUME_TIMEOUT = 300.0  # seconds; two or three on a quiet machine


class Testbed:
    """A context manager: leaving it ends the hosts. ``bed["xen1"]`` is a host."""

    __test__ = False  # the name begins like a test's

    def __init__(self, name: str, images: Path, hosts: dict[str, Host], switches: Sequence[int]) -> None:
        self.name = name
        self.images = images
        self.hosts = hosts
        self._switches = tuple(switches)

    @classmethod
    def resume(
        cls,
        name: str = "default",
        *,
        hosts: Sequence[str] = ("xen1",),
        state: str = PRISTINE,
        settle: bool = True,
        guest_disk: Path | None = None,
    ) -> Testbed:
        """Starts ``hosts`` from a saved state; builds the images and boots the hosts first if they were never saved. Raises TestbedError.

        An earlier bed of this name is ended. ``settle`` False: the hosts are left as they were saved (their clocks, too). ``guest_disk``:
        what guests without a disk of their own share, in place of the one that was built.
        """
        require_tools(install=True)
        unknown = set(hosts) - set(NUMBERS)
        if unknown or not hosts:
            raise TestbedError(
                f"a testbed's hosts are {', '.join(NUMBERS)}; not {', '.join(sorted(unknown)) or 'none'}"
            )
        images = build()
        cls.end(name)
        if state == PRISTINE:
            for kind in sorted({_kind(host) for host in hosts}):
                _make_pristine(kind, images)
        saved = {host: _saved(images, state, host) for host in hosts}
        bed = cls._start(name, images, saved, resume=SNAPSHOT, guest_disk=guest_disk)
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda host: host.wait_until_reachable(timeout=RESUME_TIMEOUT), bed.hosts.values()))
                if settle:
                    list(pool.map(lambda host: _settle(host, state), bed.hosts.values()))
        except BaseException:
            bed.stop()
            raise
        return bed

    @classmethod
    def running(cls, name: str = "default") -> Testbed | None:
        """The bed of this name that runs now; None if there is none."""
        folder = places.bed(name)
        try:
            record = json.loads((folder / "bed.json").read_text())
        except (OSError, ValueError):
            return None
        hosts = {}
        for one in record["hosts"]:
            plan = Plan(
                **{
                    **one["plan"],
                    **{key: Path(one["plan"][key]) for key in ("images", "disk", "run")},
                    "cables": tuple(map(tuple, one["plan"]["cables"])),
                }
            )
            hosts[plan.name] = Host(plan.name, plan.number, Machine(plan, one["pid"]), plan.images / "id_ed25519")
        return cls(name, Path(record["images"]), hosts, record["switches"])

    @classmethod
    def end(cls, name: str = "default") -> bool:
        """Ends the bed of this name; False if there is none."""
        bed = cls.running(name)
        if bed is None:
            return False
        bed.stop()
        return True

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the beds that were started and not ended."""
        return tuple(sorted(path.parent.name for path in (places.folder() / "beds").glob("*/bed.json")))

    @staticmethod
    def has_state(state: str, hosts: Sequence[str]) -> bool:
        """The state is there for these hosts, of the present images."""
        images = build()
        return all((images / "states" / state / f"{host}.qcow2").exists() for host in hosts)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def save(self, state: str) -> None:
        """Saves all hosts as ``state``, and ends the bed."""
        for host in self.hosts.values():
            host.run("sync", check=False)
            host.hang_up()
        folder = self.images / "states" / state
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        for host in self.hosts.values():
            host.machine.save(SNAPSHOT)
            shutil.move(host.machine.plan.disk, folder / f"{host.name}.qcow2")
        self.stop()

    def stop(self) -> None:
        """Ends every host at once, and removes what they wrote."""
        for host in self.hosts.values():
            host.hang_up()
            host.machine.kill()
        for pid in self._switches:
            _end_switch(pid)
        shutil.rmtree(places.bed(self.name), ignore_errors=True)

    @classmethod
    def _start(
        cls, name: str, images: Path, saved: dict[str, Path], *, resume: str | None, guest_disk: Path | None = None
    ) -> Testbed:
        folder = places.bed(name)
        folder.mkdir(parents=True, mode=0o700)
        shown = images if guest_disk is None else _images_with(guest_disk, images, folder / "images")
        names = list(saved)
        ssh = free_ports(len(names))
        lans = 2  # the management network, and that of the guests
        cables = free_ports(lans * (len(names) + 1), kind=socket.SOCK_DGRAM)
        switches: list[int] = []
        machines: list[Machine] = []
        try:
            for lan in range(lans):
                ports = cables[lan * (len(names) + 1) :][: len(names) + 1]
                switches.append(_start_switch(ports[0], ports[1:], folder))
            for index, host in enumerate(names):
                lines = [cables[lan * (len(names) + 1) :] for lan in range(lans)]
                disk = folder / f"{host}.qcow2"
                run(["cp", "--reflink=auto", "--sparse=always", saved[host], disk])
                plan = Plan(
                    kind=_kind(host),
                    number=NUMBERS[host],
                    images=shown,
                    disk=disk,
                    run=folder,
                    name=host,
                    ssh_port=ssh[index],
                    cables=tuple((line[index + 1], line[0]) for line in lines),
                    resume=resume,
                )
                machines.append(Machine.start(plan))
        except BaseException:
            for machine in machines:
                machine.kill()
            for pid in switches:
                _end_switch(pid)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        key = images / "id_ed25519"
        hosts = {machine.plan.name: Host(machine.plan.name, machine.plan.number, machine, key) for machine in machines}
        _write_ssh_config(folder, hosts.values(), key)
        bed = cls(name, images, hosts, switches)
        bed._record()
        return bed

    def _record(self) -> None:
        record = {
            "images": str(self.images),
            "switches": self._switches,
            "hosts": [{"plan": asdict(host.machine.plan), "pid": host.machine.pid} for host in self.hosts.values()],
        }
        (places.bed(self.name) / "bed.json").write_text(json.dumps(record, default=str, indent=1))


def _images_with(guest_disk: Path, images: Path, folder: Path) -> Path:
    """The images, with another disk for guests."""
    folder.mkdir()
    for path in images.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(guest_disk.absolute() if path.name == "guest.ext4" else path)
    return folder


def _kind(host: str) -> str:
    return "grid" if host.startswith("grid") else "xen"


def _saved(images: Path, state: str, host: str) -> Path:
    """The saved disk of a host. Of the pristine Xen hosts there is one for all."""
    if state == PRISTINE:
        path = _pristine(images, "grid1" if _kind(host) == "grid" else "xen1")
    else:
        path = images / "states" / state / f"{host}.qcow2"
    if not path.exists():
        raise TestbedError(f"no host {host} was saved as '{state}'")
    return path


def _pristine(images: Path, name: str) -> Path:
    return images / "states" / f"{PRISTINE}-{pristine_digest()}" / f"{name}.qcow2"


def pristine_digest() -> str:
    """Of what makes hosts pristine beside the images: this module and ``host``. 8 hexadecimal digits."""
    digest = hashlib.sha256()
    for module in (Path(__file__), Path(__file__).with_name("host.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:8]


def _make_pristine(kind: str, images: Path) -> None:
    """Boots a host of this kind for the first time, and saves it."""
    name = "grid1" if kind == "grid" else "xen1"
    target = _pristine(images, name)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with process_lock(images / "states" / f"{name}.lock", lambda _: None):
        if target.exists():
            return
        begin = time.monotonic()
        print(f"testbed: booting {name} for the first time", file=sys.stderr, flush=True)
        empty = target.with_suffix(".new")
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", images / "host.ext4", empty])
        bed = Testbed._start(f"first-{name}", images, {name: empty}, resume=None)
        try:
            host = bed[name]
            host.machine.wait_for_console("TESTBED READY", timeout=BOOT_TIMEOUT)
            host.wait_until_reachable(timeout=RESUME_TIMEOUT)
            host.set_clock()
            if kind == "grid":
                host.become(NUMBERS["grid1"], name="grid1")
            host.run("systemctl is-system-running --wait", check=False)
            host.run("sync")
            host.hang_up()
            host.machine.save(SNAPSHOT)
            shutil.move(host.machine.plan.disk, target)
        finally:
            bed.stop()
            empty.unlink(missing_ok=True)
        print(f"testbed: {name} is saved ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)


def _settle(host: Host, state: str) -> None:
    host.set_clock()
    if _kind(host.name) == "xen":
        # The disk that guests share may be another than when the host was saved.
        host.run("blockdev --flushbufs /dev/vdb; echo 3 >/proc/sys/vm/drop_caches")
    if state == PRISTINE and host.number > 1 and _kind(host.name) == "xen":
        host.become(host.number, name=host.name)


def _write_ssh_config(folder: Path, hosts: Iterable[Host], key: Path) -> None:
    text = ""
    for host in hosts:
        text += f"""\
Host {host.name}
    HostName 127.0.0.1
    Port {host.ssh_port}
    User root
    IdentityFile {key}
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 20
    ControlMaster auto
    ControlPath {folder}/{host.name}.ssh
    ControlPersist 600
"""
    text += f"""\
Host 192.168.77.*
    User root
    IdentityFile {key}
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 60
    ServerAliveInterval 15
    ServerAliveCountMax 4
    ControlMaster auto
    ControlPath {folder}/%h.ssh
    ControlPersist 600
"""
    (folder / "ssh_config").write_text(text)


def _start_switch(port: int, hosts: Sequence[int], folder: Path) -> int:
    words = [sys.executable, "-m", "testbed.switch", str(port), *map(str, hosts)]
    log = (folder / f"switch-{port}.log").open("wb")
    with log:
        process = subprocess.Popen(
            words, cwd=places.ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return process.pid


def _end_switch(pid: int) -> None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if b"testbed.switch" in words:
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
