"""Response nonces (§10.1, §11.3): when the provider spoke, and something that makes the moment unique."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from datetime import UTC, datetime

from secfunet.openid.errors import OpenIdFormatError

MAX_NONCE = 255
_NONCE = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)Z([\x21-\x7e]{0,235})", re.ASCII)


def make_nonce(now: float, randbytes: Callable[[int], bytes]) -> str:
    """``yyyy-mm-ddThh:mm:ssZ`` and 12 random bytes."""
    moment = datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return moment + base64.urlsafe_b64encode(randbytes(12)).decode("ascii")


def nonce_time(untrusted: str) -> float:
    """When a nonce says that it was made, UTC seconds. Raises OpenIdFormatError if it is none."""
    match = _NONCE.fullmatch(untrusted)
    if match is None:
        raise OpenIdFormatError("this is no response nonce")
    try:
        year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        raise OpenIdFormatError("a response nonce names no moment") from None
