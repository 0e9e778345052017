"""Xen's shared libraries, found when they are needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from secfunet.xen.errors import XenError

_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


@functools.cache
def load(name: str, package: str) -> ctypes.CDLL:
    """``lib<name>.so.*``, the newest there is. Raises XenError, which names the Debian package.

    libxenvchan's version is Xen's: a guest need not have that of its host, the ring in shared memory has not changed since Xen 4.2.
    """
    for candidate in _candidates(name):
        try:
            return ctypes.CDLL(candidate, use_errno=True)
        except OSError:
            continue
    raise XenError(f"lib{name} is not installed here (Debian package {package})")


def _candidates(name: str) -> Sequence[str]:
    files = [path for folder in _FOLDERS for path in Path(folder).glob(f"lib{name}.so.*")]
    newest_first = sorted(files, key=lambda path: (_version(path), -len(str(path))), reverse=True)
    return [*map(str, newest_first), f"lib{name}.so"]


def _version(path: Path) -> tuple[int, ...]:
    words = path.name.partition(".so.")[2].split(".")
    return tuple(int(word) if word.isdigit() else 0 for word in words)
