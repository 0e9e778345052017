"""One process at a time in one place: a lock file that the kernel releases with its holder, and that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from secfunet.errors import SecFuNetError
from secfunet.service.files import open_private


class LockHeldError(SecFuNetError):
    """Another process holds the lock. ``pid``: its process id; None if it cannot be read yet."""

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path} is held by " + ("another process" if pid is None else f"process {pid}"))
        self.path = path
        self.pid = pid


@contextlib.contextmanager
def process_lock(path: Path, waiting: Callable[[int | None], None] | None = None) -> Iterator[None]:
    """Holds the lock file ``path`` (made with mode 0600 if it is not there, and left there).

    If another process holds it: with ``waiting``, that is called once with the holder's process id and the lock is waited for; without it,
    raises LockHeldError. The lock is on the open file, so that it ends with the process, however that ends.
    """
    descriptor = open_private(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            if waiting is None:
                raise LockHeldError(path, holder) from None
            waiting(holder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0).strip()
    return int(text) if text.isdigit() else None
