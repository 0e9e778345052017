"""Lines and tokens (draft-urien-core-racs-15, 2.1): printable ASCII, CRLF at the end of each line, tokens between spaces.

Every bound is here. The draft has none; that of a line is what the longest APDU needs in hexadecimal.
"""

from __future__ import annotations

import re
from typing import Final

from secfunet.racs.errors import RacsProtocolError, RacsValueError

MAX_APDU: Final = 65544
"""Bytes of the longest command APDU: header, extended Lc, 65535 of data, extended Le."""
MAX_LINE: Final = 2 * MAX_APDU + 1024
"""Characters of a line, without CRLF."""
MAX_COMMANDS: Final = 128
"""Command lines of a request, BEGIN and END not counted."""
MAX_REQUEST: Final = 2**19
"""Characters of a whole request."""
MAX_ANSWER: Final = 2**20
"""Characters of a whole answer."""
MAX_TOKEN: Final = 64
"""Characters of a SEID, of a request's identifier, and of any other name."""
VERSION: Final = "0.2"
"""The version that draft -15 says it is (2.3.4)."""

_TEXT: Final = re.compile(rb"[ -~]*")
_SEID: Final = re.compile(r"(?:(?![\[\];])[!-~]){1,64}", re.ASCII)
_TOKEN: Final = re.compile(r"[!-~]{1,64}", re.ASCII)
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+", re.ASCII)


class LineReader:
    """Cuts what comes into lines. It keeps what it was fed until it is taken out: feed it no more than is read."""

    def __init__(self) -> None:
        self._input = bytearray()
        self._searched = 0

    def __len__(self) -> int:
        return len(self._input)

    def feed(self, untrusted: bytes) -> None:
        """More bytes of the stream."""
        self._input += untrusted

    def take(self) -> str | None:
        """The next line, without CRLF; None: it is not all there. Raises RacsProtocolError."""
        end = self._input.find(b"\n", self._searched)
        if (end if end >= 0 else len(self._input)) > MAX_LINE + 1:
            raise RacsProtocolError(f"a line has more than {MAX_LINE} characters")
        if end < 0:
            self._searched = len(self._input)
            return None
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        self._searched = 0
        if not line.endswith(b"\r"):
            raise RacsProtocolError("a line does not end with CRLF")
        if _TEXT.fullmatch(line, 0, len(line) - 1) is None:
            raise RacsProtocolError("a line is not printable ASCII")
        return line[:-1].decode("ascii")


def tokens_of(line: str) -> list[str]:
    """The words of a line; one or more spaces are between two of them."""
    return [token for token in line.split(" ") if token]


def check_seid(untrusted: str) -> str:
    """Returns ``untrusted`` if a secure element may be called so in RACS: 1 to 64 printable characters, no space, ``[``, ``]``, ``;``.

    Raises RacsValueError.
    """
    if _SEID.fullmatch(untrusted) is None:
        raise RacsValueError("a SEID has 1 to 64 printable characters, and no space, '[', ']' or ';'")
    return untrusted


def check_token(untrusted: str) -> str:
    """Returns ``untrusted`` if it is one token of at most 64 characters. Raises RacsValueError."""
    if _TOKEN.fullmatch(untrusted) is None:
        raise RacsValueError(f"a token has 1 to {MAX_TOKEN} printable characters and no space")
    return untrusted


def parse_hex(untrusted: str, sizes: range) -> bytes:
    """Bytes in hexadecimal, either case, as many as ``sizes`` allows. Raises RacsValueError."""
    if len(untrusted) > 2 * sizes[-1] or _HEX.fullmatch(untrusted) is None or len(untrusted) // 2 not in sizes:
        allowed = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        raise RacsValueError(f"that is not {allowed} bytes in hexadecimal")
    return bytes.fromhex(untrusted)
