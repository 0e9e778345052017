"""xenstore, through Xen's own library (libxenstore: xenstore.h): dom0's and each domain's small shared tree.

A relative path is relative to the caller's own domain. Calls block for the time of an exchange with xenstored, which is short; whoever must
not wait calls them in a thread. An object may be used by several threads.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from secfunet.xen.errors import XenstoreError
from secfunet.xen.libraries import load

MAX_VALUE = 2048  # bytes of a value: xenstored takes 4096 with path and header
PACKAGE = "libxenstore4"
_NONE, _READ = 0, 1  # enum xs_perm_type


class _Permissions(ctypes.Structure):
    """``struct xs_permissions``."""

    _fields_ = [("id", ctypes.c_uint), ("perms", ctypes.c_int)]


class Xenstore:
    """One connection. Raises XenstoreError if xenstore cannot be reached (this is no Xen domain, or not permitted)."""

    def __init__(self) -> None:
        self._library = _library()
        self._handle = self._library.xs_open(0)
        if not self._handle:
            raise _error("xenstore cannot be reached")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the connection; does nothing the second time."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.xs_close(handle)

    def read(self, path: str) -> bytes | None:
        """A value; None if there is none. Raises XenstoreError (``errno`` EACCES: this domain may not read it)."""
        length = ctypes.c_uint()
        value = self._library.xs_read(self._open(), 0, path.encode(), ctypes.byref(length))
        if not value:
            if ctypes.get_errno() == errno.ENOENT:
                return None
            raise _error(f"{path} cannot be read from xenstore")
        try:
            return ctypes.string_at(value, length.value)
        finally:
            _free(value)

    def write(self, path: str, value: bytes, *, readers: Iterable[int] | None = None) -> None:
        """Writes a value; with ``readers``, so that dom0 owns it and only these domains may read it.

        The permissions are there before the value is. Raises XenstoreError.
        """
        if len(value) > MAX_VALUE:
            raise XenstoreError(f"{path}: a value in xenstore has at most {MAX_VALUE} bytes here", errno.E2BIG)
        if readers is not None:
            self._write(path, b"")
            self.set_permissions(path, readers)
        self._write(path, value)

    def remove(self, path: str) -> None:
        """Removes a node with all below it; does nothing if there is none. Raises XenstoreError."""
        if not self._library.xs_rm(self._open(), 0, path.encode()) and ctypes.get_errno() != errno.ENOENT:
            raise _error(f"{path} cannot be removed from xenstore")

    def set_permissions(self, path: str, readers: Iterable[int], *, owner: int = 0) -> None:
        """``owner`` may do everything, ``readers`` may read, all other domains nothing. Raises XenstoreError."""
        entries = [_Permissions(owner, _NONE), *(_Permissions(reader, _READ) for reader in readers)]
        array = (_Permissions * len(entries))(*entries)
        if not self._library.xs_set_permissions(self._open(), 0, path.encode(), array, len(entries)):
            raise _error(f"the permissions of {path} cannot be set")

    def list(self, path: str) -> tuple[str, ...]:
        """The names below a node; none if there is no such node. Raises XenstoreError."""
        count = ctypes.c_uint()
        names = self._library.xs_directory(self._open(), 0, path.encode(), ctypes.byref(count))
        if not names:
            if ctypes.get_errno() == errno.ENOENT:
                return ()
            raise _error(f"{path} cannot be listed")
        try:
            return tuple(names[index].decode(errors="replace") for index in range(count.value))
        finally:
            _free(names)

    def _write(self, path: str, value: bytes) -> None:
        if not self._library.xs_write(self._open(), 0, path.encode(), value, len(value)):
            raise _error(f"{path} cannot be written to xenstore")

    def _open(self) -> Any:
        if not self._handle:
            raise XenstoreError("this connection to xenstore is closed")
        return self._handle


def _library() -> ctypes.CDLL:
    library = load("xenstore", PACKAGE)
    handle, transaction, path = ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p
    size = ctypes.POINTER(ctypes.c_uint)
    # xs_transaction_t is 32 bits wide, and 0 means none.
    for name, result, arguments in (
        ("xs_open", handle, [ctypes.c_ulong]),
        ("xs_close", None, [handle]),
        ("xs_read", ctypes.c_void_p, [handle, transaction, path, size]),
        ("xs_write", ctypes.c_bool, [handle, transaction, path, ctypes.c_char_p, ctypes.c_uint]),
        ("xs_rm", ctypes.c_bool, [handle, transaction, path]),
        ("xs_directory", ctypes.POINTER(ctypes.c_char_p), [handle, transaction, path, size]),
        (
            "xs_set_permissions",
            ctypes.c_bool,
            [handle, transaction, path, ctypes.POINTER(_Permissions), ctypes.c_uint],
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _free(pointer: Any) -> None:
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(ctypes.cast(pointer, ctypes.c_void_p))


def _error(what: str) -> XenstoreError:
    code = ctypes.get_errno()
    return XenstoreError(f"{what}: {os.strerror(code)}", code)
