"""Where a command's result goes: standard output, or what a user names with ``--out``, which may be any kind of file.

A path that a user names is the user's: links are followed, devices, pipes and descriptors are written into, and a regular file is replaced
whole while it keeps its owner and its mode. ``secfunet.service.files`` is for the programs' own state, which is another matter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from secfunet.errors import SecFuNetError
from secfunet.service.files import UnsafeFileError, open_folder

_DESCRIPTOR: Final = re.compile(r"/(?:dev/fd|proc/(?:self|thread-self)/fd)/([0-9]{1,7})", re.ASCII)
_MAX_LINKS: Final = 40
_STANDARD: Final = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


class StreamClosedError(SecFuNetError):
    """A standard stream is needed that whoever started this program has closed."""


class NotWrittenError(SecFuNetError):
    """A result could not be written to where it was to go; a regular file is as it was, unless only it and not
    its folder may be written: then it is written in place, and a full disk may cut it off."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: {error.strerror or error}: the result was not written")
        self.path = path
        self.errno = error.errno


def standard_input() -> BinaryIO:
    """The bytes of standard input. Raises StreamClosedError."""
    if sys.stdin is None:
        raise StreamClosedError("standard input is closed: name a file in place of '-'")
    return sys.stdin.buffer


def standard_output() -> BinaryIO:
    """For bytes to standard output. Raises StreamClosedError."""
    if sys.stdout is None:
        raise StreamClosedError("standard output is closed: name a file with --out")
    return sys.stdout.buffer


@contextlib.contextmanager
def opened_input(name: str) -> Iterator[BinaryIO]:
    """The file ``name``, or standard input for ``-``. Raises StreamClosedError; OSError with the name as its file."""
    if name == "-":
        yield standard_input()
        return
    with Path(name).open("rb") as file:
        yield file


def write_result(content: bytes, out: Path | None, *, mode: int = 0o600) -> None:
    """Writes ``content`` to ``out`` (None or ``-``: standard output). ``mode``: of a file that is made, as far as the umask allows.

    Raises NotWrittenError, which names the path that was given; UnsafeFileError for another user's link; StreamClosedError.
    """
    if out is None or str(out) == "-":
        stream = standard_output()
        stream.write(content)
        stream.flush()
        return
    try:
        descriptor = _descriptor_of(out)
        if descriptor is not None:
            _write_and_close(os.dup(descriptor), content)
            return
        target = _place_of(out)
        try:
            there = target.stat()
        except FileNotFoundError:
            there = None
        if there is None or stat.S_ISREG(there.st_mode):
            _replace(target, content, there, mode)
        else:
            with _folder_of(target) as folder:
                _write_and_close(_open_there(target, folder), content)
    except OSError as error:
        raise NotWrittenError(out, error) from error


def _descriptor_of(path: Path) -> int | None:
    """The number of an open file of this process, if that is what the path names: it is written at its place, not opened anew."""
    name = os.path.normpath(path)
    if name in _STANDARD:
        return _STANDARD[name]
    match = _DESCRIPTOR.fullmatch(name)
    return int(match[1]) if match else None


def _write_and_close(descriptor: int, content: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _place_of(out: Path) -> Path:
    """The path without links on its way. Raises UnsafeFileError for a link that another user made to what is not his: he would choose which
    file of this user's, or of root's, is overwritten.
    """
    left, place, makers = [*reversed(out.absolute().parts)], Path("/"), list[tuple[Path, int]]()
    while left:
        part = left.pop()
        if part in ("/", ".."):
            place = Path("/") if part == "/" else place.parent
            continue
        step = place / part
        try:
            status = step.lstat()
        except FileNotFoundError:
            place = step.joinpath(*reversed(left))
            break
        if not stat.S_ISLNK(status.st_mode):
            place = step
            continue
        if len(makers) == _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(out))
        makers.append((step, status.st_uid))
        left += reversed(step.readlink().parts)
    if makers:
        owner = (place if place.exists() else place.parent).stat().st_uid
        for link, maker in makers:
            if maker not in (0, os.geteuid(), owner):
                raise UnsafeFileError(
                    link, f"is a symbolic link of another user (uid {maker}) to what is not his: not followed"
                )
    return place


@contextlib.contextmanager
def _folder_of(target: Path) -> Iterator[int]:
    # Who may only write into a folder, and not read it, may put a result there.
    is_root = os.geteuid() == 0
    folder = (
        open_folder(target.parent) if is_root else os.open(target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    )
    try:
        yield folder
    finally:
        os.close(folder)


def _open_there(target: Path, folder: int, flags: int = 0) -> int:
    """The file itself: a link that came into its place meanwhile is not followed."""
    flags |= os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(target.name or ".", flags, dir_fd=folder)


def _replace(target: Path, content: bytes, there: os.stat_result | None, mode: int) -> None:
    """The old content or the new, never a part of it; in place where the folder takes no new file but the file may be written.

    What root makes in a folder of another user is that user's.
    """
    if there is not None and not os.access(target, os.W_OK):
        raise PermissionError(13, os.strerror(13), str(target))
    unfinished = f".{target.name[:200]}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    is_root = os.geteuid() == 0
    with _folder_of(target) as folder:
        try:
            descriptor = os.open(unfinished, flags, mode if there is None else 0o600, dir_fd=folder)
        except PermissionError:
            if there is None:
                raise
            _write_and_close(_open_there(target, folder, os.O_TRUNC), content)
            return
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                owner = there or os.fstat(folder)
                is_ours = (owner.st_uid, owner.st_gid) == (os.geteuid(), os.getegid())
                if not is_ours and (is_root or there is not None):
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
                if there is not None:
                    os.fchmod(descriptor, stat.S_IMODE(there.st_mode))
                file.flush()
                os.fsync(descriptor)
            os.rename(unfinished, target.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=folder)
            raise
