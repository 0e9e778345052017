"""Takes the ELF image out of a Linux bzImage, so that nothing has to be unpacked under emulation.

Layout: Documentation/arch/x86/boot.rst of Linux ("The Real-Mode Kernel Header": setup_sects at 0x1f1, payload_offset at 0x248,
payload_length at 0x24c).
"""

from __future__ import annotations

import lzma
import struct
import zlib
from pathlib import Path

from testbed.errors import TestbedError
from testbed.tools import run

_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x02\x21\x4c\x18": "lz4",
}


def payload(bzimage: bytes) -> bytes:
    """The compressed payload. Raises TestbedError if this is no bzImage that has one."""
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] == b"\0\0\0\0" or bzimage[0x1FE:0x200] != b"\x55\xaa":
        raise TestbedError("this is no Linux bzImage")
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    begin = (sectors + 1) * 512 + offset
    if length == 0 or begin + length > len(bzimage):
        raise TestbedError("this bzImage has no payload")
    return bzimage[begin : begin + length]


def extract(bzimage: Path, vmlinux: Path) -> None:
    """Writes the ELF image that is in ``bzimage``. Raises TestbedError."""
    packed = payload(bzimage.read_bytes())
    kind = next((kind for magic, kind in _MAGICS.items() if packed.startswith(magic)), None)
    if kind == "xz":
        # Four bytes with the size follow the stream.
        image = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(packed)
    elif kind == "gzip":
        image = zlib.decompressobj(31).decompress(packed)
    elif kind == "zstd":
        image = run(["zstd", "-dcq"], data=packed[:-4])
    elif kind == "lz4":
        # Of the legacy format lz4 complains about the size behind it, but only after it has written everything.
        image = run(["lz4", "-dcq"], data=packed[:-4])
    else:
        raise TestbedError(f"{bzimage}: a payload of an unknown kind ({packed[:6].hex()})")
    if not image.startswith(b"\x7fELF"):
        raise TestbedError(f"{bzimage}: what is in it is no ELF image")
    vmlinux.write_bytes(image)
