"""Root file systems from Debian's packages: of a host, and of a guest on a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from testbed import places
from testbed.tools import run

MANY_GENERATORS = ("systemd-fstab-generator", "systemd-run-generator")
HOST_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "crc32c_generic", "bridge", "tun", "loop"),
    *("xenfs", "xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xen-netback", "xen-blkback"),
    *("nf_tables", "sch_ingress", "cls_bpf", "overlay", "isofs", "vfat", "nls_cp437", "nls_ascii"),
)
GUEST_MODULES = (
    *("xenfs", "xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xen-netfront", "xen-blkfront"),
    *("overlay", "isofs", "vfat", "nls_cp437", "nls_ascii"),
)
_APT_OPTIONS = (
    '--aptopt=Acquire::Languages "none"',
    '--aptopt=APT::Install-Recommends "false"',
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)


def bootstrap(packages: Path, root: Path) -> None:
    """A Debian root with these packages, from this machine's own package sources. Raises TestbedError."""
    sources = [*Path("/etc/apt/sources.list.d").glob("*.sources"), Path("/etc/apt/sources.list")]
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            *_APT_OPTIONS,
            f"--include={','.join(places.lines(packages))}",
            "bookworm",
            root,
            *(source for source in sources if source.exists()),
        ]
    )


def copy_modules(kernel: Path, version: str, names: tuple[str, ...], root: Path) -> None:
    """These modules of an unpacked kernel package, with all that they need, into ``root``."""
    files = set()
    for name in names:
        shown = run(["modprobe", "-d", kernel, "-S", version, "--show-depends", name]).decode()
        files |= {words[1] for words in map(str.split, shown.splitlines()) if words and words[0] == "insmod"}
    folder = root / "usr" / "lib" / "modules" / version
    if not (root / "lib").exists():
        (root / "lib").mkdir(parents=True)
    base = folder if (root / "lib").is_symlink() else root / "lib" / "modules" / version
    base.mkdir(parents=True, exist_ok=True)
    origin = kernel / "lib" / "modules" / version
    for file in sorted(files):
        target = base / Path(file).relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo"):
        shutil.copyfile(origin / name, base / name)
    run(["depmod", "-b", root, version])


def overlay(recipe: Path, root: Path) -> None:
    """The files of a recipe, over those of the packages; all are root's."""
    for path in sorted(recipe.rglob("*")):
        target = root / path.relative_to(recipe)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def prepare_systemd(root: Path, *, enabled: tuple[str, ...]) -> None:
    """Masks what a short-lived machine does without, and enables units of the recipe."""
    units = root / "etc" / "systemd" / "system"
    for unit in places.lines(places.RECIPES / "masked-units.txt"):
        _link(units / unit, "/dev/null")
    generators = root / "etc" / "systemd" / "system-generators"
    generators.mkdir(exist_ok=True)
    for generator in (root / "lib" / "systemd" / "system-generators").iterdir():
        if generator.name not in MANY_GENERATORS:
            _link(generators / generator.name, "/dev/null")
    _link(units / "default.target", "/lib/systemd/system/multi-user.target")
    for unit in enabled:
        wants = units / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        _link(wants / unit, f"/etc/systemd/system/{unit}")


def finish_root(root: Path, *, name: str, machine_id: str, public_key: str, host_key: Path) -> None:
    """Identity, the way in by ssh, and no password for root's console."""
    (root / "etc" / "hostname").write_text(f"{name}\n")
    # Without one, systemd takes every boot for the first.
    (root / "etc" / "machine-id").write_text(f"{machine_id}\n")
    (root / "etc" / "hosts").write_text(HOSTS)
    (root / "etc" / "resolv.conf").unlink(missing_ok=True)
    (root / "etc" / "resolv.conf").write_text("")
    ssh = root / "root" / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    (ssh / "authorized_keys").write_text(public_key)
    for old in (root / "etc" / "ssh").glob("ssh_host_*"):
        old.unlink()
    key = root / "etc" / "ssh" / "ssh_host_ed25519_key"
    shutil.copyfile(host_key, key)
    key.chmod(0o600)
    shutil.copyfile(host_key.with_suffix(".pub"), key.with_suffix(".pub"))


HOSTS = """\
127.0.0.1 localhost
192.168.78.1 xen1
192.168.78.2 xen2
192.168.78.10 grid1 grid.example
"""


def mend_libvirt(root: Path) -> None:
    """Only libvirt's Xen driver, and a CPU model that it finds under emulation.

    The other drivers fail without their users and programs, and libvirtd with them. Xen hides SEP on CPUs of AMD's kind, so libvirt finds
    no model that fits the emulated CPU unless SEP is taken out of it.
    """
    drivers = root / "usr" / "lib" / "x86_64-linux-gnu" / "libvirt" / "connection-driver"
    unused = drivers.with_name("unused")
    unused.mkdir()
    for driver in drivers.glob("*.so"):
        if "libxl" not in driver.name:
            driver.rename(unused / driver.name)
    for model in ("x86_qemu64.xml", "x86_kvm64.xml"):
        path = root / "usr" / "share" / "libvirt" / "cpu_map" / model
        kept = [line for line in path.read_text().splitlines(keepends=True) if "name='sep'" not in line]
        path.write_text("".join(kept))


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
