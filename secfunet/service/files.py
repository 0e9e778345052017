"""Files that survive a crash: the old content or the new, never a half; and readable by their owner alone."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from secfunet.errors import SecFuNetError

_UNFINISHED = ".unfinished"


class UnsafeFileError(SecFuNetError):
    """A file that holds a secret can be read or written by others than its owner."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replaces ``path`` by ``content`` in one step that a power cut cannot split (write, fsync, rename, fsync of the folder)."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    sync_folder(path.parent)


def remove_unfinished(path: Path) -> None:
    """Removes what writers of ``path`` that were killed left beside it. Only for who knows that no other process writes it now."""
    for leftover in path.parent.glob(f".{path.name}.????????{_UNFINISHED}"):
        leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename or an unlink in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """Makes ``path`` (and its parents) if need be, with mode 0700; returns it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def read_secret(path: Path, *, limit: int = 65536) -> bytes:
    """Reads a file that only its owner may read (mode 0600 or 0400).

    A systemd credential is such a file, too, though its mode may show a right of the group: there it is the mask of an ACL that names this
    service's user, systemd.exec(5). Raises UnsafeFileError if group or others have any right on it, or if it is larger than
    ``limit`` bytes.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    forbidden = 0o037 if credentials and path.absolute().parent == Path(credentials) else 0o077
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeFileError(path, "is no regular file")
        if status.st_mode & forbidden:
            raise UnsafeFileError(
                path, f"holds a secret but has mode {stat.S_IMODE(status.st_mode):04o}: run chmod 600 on it"
            )
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnsafeFileError(path, f"is larger than {limit} bytes")
    return content
