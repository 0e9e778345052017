"""The id of a call: one metadata key (and HTTP header), one grammar.

An id is what finds a call in the records of agent, middleware and grid. It is a caller's own if that has the form, else a new one.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

CORRELATION_KEY: Final = "secfunet-correlation-id"
MAX_CORRELATION: Final = 64  # characters
_GRAMMAR = re.compile(rf"[A-Za-z0-9-]{{1,{MAX_CORRELATION}}}")


def new_correlation() -> str:
    """16 hexadecimal digits that were never used before."""
    return secrets.token_hex(8)


def with_id(sentence: str, correlation: str) -> str:
    """A message that a person can quote to who can look the id up."""
    return f"{sentence} (id {correlation})"


def is_correlation(untrusted: object) -> bool:
    """Whether it has the form of an id: 1 to 64 letters, digits and "-"."""
    return isinstance(untrusted, str) and _GRAMMAR.fullmatch(untrusted) is not None


def guest_id(untrusted: object) -> str:
    """The id that a guest chose, if it has the form; else ""."""
    return untrusted if isinstance(untrusted, str) and is_correlation(untrusted) else ""


def clean_correlation(untrusted: object) -> str:
    """The caller's id if it has the form of one, else a new one."""
    return untrusted if isinstance(untrusted, str) and is_correlation(untrusted) else new_correlation()
