"""Unix sockets at a path: nothing is removed that this process, or one that died, did not bind there.

A path that holds anything but a socket is refused, and so is one where somebody listens. A socket that nobody listens at is what a dead
process left: it is replaced. At the end the path is removed only if it still holds the very socket that was bound.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from secfunet.errors import SecFuNetError

MAX_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less its final zero
_LOCK_WAIT = 1.0  # seconds; who holds the folder's lock for longer is not starting a daemon


class SocketPathError(SecFuNetError):
    """A process cannot listen at ``path``; the message says why."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.path = path


class SocketInUse(SocketPathError):
    """Another process listens at ``path``."""


class OwnSocket:
    """The socket that this process has at ``path``; a context manager that removes it at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Kept open, so that the inode's number cannot be given to another file meanwhile.
        self._descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    def remove(self) -> None:
        """Removes it if it is still there. Nothing happens the second time."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        ours = os.fstat(descriptor)
        try:
            found = self.path.lstat()
            if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                self.path.unlink()
        except OSError:
            pass  # gone, or in a folder that is
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def bind_unix(
    path: Path, *, mode: int = 0o600, group: int | None = None, backlog: int = 100
) -> tuple[socket.socket, OwnSocket]:
    """A listening socket at ``path`` (with the ``mode``, and the group's number, before the first connection), and its file.

    Raises SocketPathError, SocketInUse.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    own: OwnSocket | None = None
    try:
        with free_path(path):
            mask = os.umask(0o177)  # born closed
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            own = OwnSocket(path)
            if group is not None:
                os.chown(path, -1, group, follow_symlinks=False)
            path.chmod(mode)
            listener.listen(backlog)
    except BaseException as error:
        if own is not None:
            own.remove()
        listener.close()
        if isinstance(error, OSError):
            raise SocketPathError(path, f"cannot be listened at: {error.strerror or error}") from error
        raise
    return listener, own


def unix_target(path: Path) -> str:
    """What gRPC calls the socket at ``path``, as a client and as a server: a URI (gRPC name resolution), in which some characters of a
    path would mean something else.

    Raises SocketPathError for a path that gRPC cannot reach, however it is written.
    """
    if "," in str(path):
        raise SocketPathError(path, "has a comma, which gRPC takes for the end of a path: choose another path")
    return f"unix:{quote(os.fsencode(path), safe='/')}"


@contextlib.contextmanager
def free_path(path: Path) -> Iterator[None]:
    """Nothing is at ``path`` inside, and no other program of ours puts anything there. Raises SocketPathError, SocketInUse, OSError."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise SocketPathError(path, f"is too long for a Unix socket: {MAX_SOCKET_PATH} bytes at most")
    with _locked(path.parent):
        _remove_stale(path)
        yield


def move_into_place(made: Path, path: Path) -> OwnSocket:
    """For a server that binds by itself and removes what it finds: it binds ``made``, in the same folder, which then becomes ``path``.

    Raises SocketPathError, SocketInUse.
    """
    try:
        with free_path(path):
            made.rename(path)
            return OwnSocket(path)
    except OSError as error:
        raise SocketPathError(path, f"cannot be listened at: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two that start at once look and bind one after the other: neither takes the other's new socket for a dead one's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield  # we may enter the folder, but not read it
        return
    try:
        # The lock is a courtesy among our own programs: a stranger who holds it must not keep a daemon from starting.
        end = time.monotonic() + _LOCK_WAIT
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SocketPathError(path, "exists and is no socket: it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            # EAGAIN: its backlog is full. EPROTOTYPE: it is of another type, and somebody's.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise SocketPathError(
                    path, f"is a socket that cannot be asked whether somebody listens: {error.strerror}"
                ) from error
    raise SocketInUse(path, "is in use: another process listens there")
