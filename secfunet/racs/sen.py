"""Names of secure elements (draft-urien-core-racs-15, 2.3.12): what TLS clients ask for (SNI), and the application that answers.

A card says its own name in the historical bytes of its answer to reset (ISO 7816-3, 8.2; at most 15 bytes).
"""

from __future__ import annotations

from secfunet.racs.errors import RacsValueError
from secfunet.racs.syntax import check_token


def name_in_atr(untrusted: bytes) -> str | None:
    """The name in the historical bytes of an answer to reset; None if there is none that can be written as a token."""
    try:
        return check_token(_historical_bytes(untrusted).decode("ascii"))
    except (UnicodeDecodeError, RacsValueError):
        return None


def describe_sen(name: str, aid: bytes | None) -> str:
    """The text of the answer to SEN: ``SEN= key1.com AID= default``."""
    return f"SEN= {name} AID= {_aid(aid)}"


def describe_get_sen(name: str, aid: bytes | None) -> str:
    """The text of the answer to GET-SEN: ``key1.com [AID= default]``."""
    return f"{name} [AID= {_aid(aid)}]"


def _aid(aid: bytes | None) -> str:
    return "default" if aid is None else aid.hex().upper()


def _historical_bytes(atr: bytes) -> bytes:
    if len(atr) < 2:
        return b""
    position = 2
    indicator, count = atr[1] >> 4, atr[1] & 0x0F
    while indicator and position < len(atr):
        # One byte each for TA, TB, TC; TD has the next indicator in its upper half.
        has_more = bool(indicator & 0x8)
        position += bin(indicator & 0x7).count("1") + has_more
        indicator = atr[position - 1] >> 4 if has_more and position <= len(atr) else 0
    return atr[position : position + count]
