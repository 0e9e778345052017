"""The seed: an ISO 9660 image with the label ``cidata``, as cloud-init's data source NoCloud looks for it among a guest's disks.

xorriso (or genisoimage) of the distribution writes it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dom0_middleware.cloud_init.user_data import FOLDER, LABEL, CloudInitError, Package, meta_data, user_data
from secfunet.service.results import write_result

WRITERS = (("xorriso", "-as", "genisoimage"), ("genisoimage",))
MAX_PACKAGE_BYTES = 256 * 1024 * 1024
MAX_NETWORK_BYTES = 65536
_PACKAGE_MAGIC = b"!<arch>\ndebian-binary"
_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A package in dom0, and what it is."""

    path: Path
    package: Package

    @classmethod
    def read(cls, path: Path) -> PackageFile:
        """Raises CloudInitError if it is no Debian package."""
        try:
            with path.open("rb") as file:
                magic = file.read(len(_PACKAGE_MAGIC))
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            raise CloudInitError(f"{path} cannot be read: {error.strerror}") from error
        if magic != _PACKAGE_MAGIC or size > MAX_PACKAGE_BYTES:
            raise CloudInitError(f"{path} is no Debian package of at most {MAX_PACKAGE_BYTES >> 20} MiB")
        return cls(path, Package(path.name, digest))


def write_seed(
    target: Path, *, uuid: str, name: str, files: list[PackageFile], fetched: list[Package], network: Path | None = None
) -> None:
    """Writes the seed of a VM, mode 0644: it holds no secret. ``files`` travel on it, ``fetched`` are packages that the guest gets itself.

    ``network``: network configuration of cloud-init (version 1 or 2) as the administrator wrote it. Raises CloudInitError; then ``target``
    is as it was.
    """
    writer = next((command for command in WRITERS if shutil.which(command[0])), None)
    if writer is None:
        raise CloudInitError("neither xorriso nor genisoimage is here: install one of these packages")
    said = user_data([*(file.package for file in files), *fetched])
    with tempfile.TemporaryDirectory(prefix="seed-") as work:
        root, image = Path(work) / "root", Path(work) / "image"
        (root / FOLDER).mkdir(parents=True)
        (root / "user-data").write_bytes(said)
        (root / "meta-data").write_bytes(meta_data(uuid, name))
        if network is not None:
            (root / "network-config").write_bytes(_network(network))
        for file in files:
            shutil.copyfile(file.path, root / FOLDER / file.package.name)
        command = [*writer, "-quiet", "-output", str(image), "-volid", LABEL, "-joliet", "-rational-rock", str(root)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)  # noqa: S603 - no shell
        except subprocess.TimeoutExpired:
            raise CloudInitError(f"{writer[0]} did not end within {_TIMEOUT:g} s") from None
        if done.returncode != 0:
            raise CloudInitError(f"{writer[0]}: {done.stderr.decode(errors='replace').strip()[-500:]}")
        write_result(image.read_bytes(), target, mode=0o644)


def _network(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_NETWORK_BYTES + 1)
    except OSError as error:
        raise CloudInitError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_NETWORK_BYTES:
        raise CloudInitError(f"{path} is larger than {MAX_NETWORK_BYTES} bytes")
    return content
