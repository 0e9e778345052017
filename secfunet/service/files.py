"""Files that survive a crash: the old content or the new, never a half; and readable by their owner alone.

Root may be the one who runs an administrator's command in a folder of a service's user. What it makes there is that user's, what it
replaces keeps its owner, and it follows no symbolic link that the user has put in its way: all is done through descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from secfunet.errors import SecFuNetError

_UNFINISHED: Final = ".unfinished"
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_LINKS: Final = 40


class UnsafeFileError(SecFuNetError):
    """A file that holds a secret can be read or written by others than its owner; or the way to a file is another user's trap."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names ``path``, whatever it was that the system refused on the way."""
    try:
        yield
    except OSError as error:
        if error.filename == str(path) or error.errno is None or type(error).__module__ == "ssl":
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replaces ``path`` by ``content`` in one step that a power cut cannot split (write, fsync, rename, fsync of the folder).

    A file that is there keeps its owner, and of its mode what ``mode`` allows. Raises OSError with ``path`` as its file, UnsafeFileError.
    """
    with naming(path), _opened(open_folder(path.parent)) as folder:
        temporary = f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _take_over(file.fileno(), path.name, folder, mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
        os.fsync(folder)


def open_private(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of the file, which is made (mode 0600) if need be. Raises OSError with ``path`` as its file, UnsafeFileError."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    with naming(path), _opened(open_folder(path.parent)) as folder:
        while True:
            try:
                return os.open(path.name, flags, dir_fd=folder)
            except FileNotFoundError:
                pass
            try:
                descriptor = os.open(path.name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            except FileExistsError:
                continue  # another process was faster
            _give_to_owner_of(folder, descriptor)
            return descriptor


def make_private(path: Path) -> None:
    """Makes the file (mode 0600) if there is none of that name, and does not open one that is there."""
    with naming(path), _opened(open_folder(path.parent)) as folder, contextlib.suppress(FileExistsError):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _opened(os.open(path.name, flags, 0o600, dir_fd=folder)) as descriptor:
            _give_to_owner_of(folder, descriptor)


def private_folder(path: Path) -> Path:
    """Makes ``path`` (mode 0700, its parents 0755) if need be; returns it. Raises OSError with ``path`` as its file, UnsafeFileError."""
    if path.is_dir():
        return path
    missing = [path]
    while not missing[-1].parent.is_dir():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        with naming(folder), _opened(open_folder(folder.parent)) as parent:
            _make_folder(folder.name, 0o700 if folder is path else 0o755, parent)
    return path


def open_folder(path: Path) -> int:
    """A descriptor of the folder. Root follows a symbolic link on the way only if it is root's, or leads to what is its owner's, too.

    Raises OSError with ``path`` as its file, UnsafeFileError.
    """
    with naming(path):
        if os.geteuid() != 0:
            return os.open(path, _FOLDER)
        return _descend(os.open("/", _FOLDER), path.absolute(), _MAX_LINKS)


def refuse_planted_link(path: Path) -> None:
    """For a file that a library opens by its name. Raises UnsafeFileError if root were to follow a symbolic link of another user."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) and os.geteuid() == 0 and status.st_uid != 0:
            raise UnsafeFileError(path, f"is a symbolic link of another user (uid {status.st_uid}): not followed")


def remove_unfinished(path: Path) -> None:
    """Removes what writers of ``path`` that were killed left beside it. Only for who knows that no other process writes it now."""
    for leftover in path.parent.glob(f".{path.name}.????????{_UNFINISHED}"):
        leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename or an unlink in ``folder`` durable."""
    with _opened(open_folder(folder)) as descriptor:
        os.fsync(descriptor)


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


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take_over(descriptor: int, name: str, folder: int, mode: int) -> None:
    """Owner and mode of the file ``name``, if it is there; else the owner of the folder."""
    try:
        before = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        before = None
    if before is None or not stat.S_ISREG(before.st_mode):
        _give_to_owner_of(folder, descriptor)
    else:
        if os.geteuid() == 0:
            os.fchown(descriptor, before.st_uid, before.st_gid)
        mode &= before.st_mode
    os.fchmod(descriptor, mode)


def _give_to_owner_of(folder: int, descriptor: int) -> None:
    owner = os.fstat(folder)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _make_folder(name: str, mode: int, parent: int) -> None:
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        return  # another process was faster
    with _opened(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)) as descriptor:
        _give_to_owner_of(parent, descriptor)


def _descend(at: int, way: Path, links: int) -> int:
    """The folder at the end of ``way``, which begins at the folder ``at`` (closed here)."""
    try:
        for part in way.parts:
            following = os.open("/", _FOLDER) if part == "/" else _step(at, part, links)
            os.close(at)
            at = following
    except BaseException:
        os.close(at)
        raise
    return at


def _step(at: int, part: str, links: int) -> int:
    try:
        return os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR) or links == 0:
            raise
        link = os.stat(part, dir_fd=at, follow_symlinks=False)
        if not stat.S_ISLNK(link.st_mode):
            raise
    target = _descend(os.dup(at), Path(os.readlink(part, dir_fd=at)), links - 1)
    if link.st_uid not in (0, os.fstat(target).st_uid):
        os.close(target)
        raise UnsafeFileError(
            Path(part),
            f"is a symbolic link of another user (uid {link.st_uid}) to a folder that is not his: not followed",
        )
    return target
