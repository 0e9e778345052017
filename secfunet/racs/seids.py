"""Lists of SEIDs (draft-urien-core-racs-15, 2.3.6): ``Device[1000-2000] SerialNumber[567;789;243] other``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from secfunet.racs.errors import RacsProtocolError, RacsValueError
from secfunet.racs.syntax import check_seid

MAX_SEIDS: Final = 4096
"""SEIDs of one list, written out."""

_SUFFIXED: Final = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})", re.ASCII)
_COMPRESSED: Final = re.compile(r"([^\[\];]*)\[([0-9;-]+)\]", re.ASCII)
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


def encode_seids(seids: Iterable[str]) -> list[str]:
    """Tokens that name all of them. Those with the same prefix and an integer suffix share a token; the order is not kept."""
    tokens: list[str] = []
    suffixes: dict[str, list[int]] = {}
    for seid in dict.fromkeys(seids):
        match = _SUFFIXED.fullmatch(check_seid(seid))
        if match is None:
            tokens.append(seid)
        else:
            suffixes.setdefault(match[1], []).append(int(match[2]))
    for prefix, numbers in suffixes.items():
        tokens += _group(prefix, sorted(numbers))
    return tokens


def _group(prefix: str, numbers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    tokens = [f"{prefix}[{run[0]}-{run[-1]}]" for run in runs if len(run) > 2]
    single = [number for run in runs if len(run) <= 2 for number in run]
    if len(single) > 1:
        tokens.append(f"{prefix}[{';'.join(map(str, single))}]")
    else:
        tokens += [f"{prefix}{number}" for number in single]
    return tokens


def decode_seids(untrusted_tokens: Iterable[str]) -> list[str]:
    """The SEIDs that the tokens name, in their order, each once. Raises RacsProtocolError."""
    seids: dict[str, None] = {}
    for token in untrusted_tokens:
        for seid in _decode_token(token, MAX_SEIDS - len(seids)):
            seids[seid] = None
    return list(seids)


def _decode_token(token: str, room: int) -> list[str]:
    match = _COMPRESSED.fullmatch(token)
    seids: list[str] = []
    try:
        for item in [None] if match is None else match[2].split(";"):
            suffixes = [token] if match is None else [f"{match[1]}{number}" for number in _range(item or "", room)]
            room -= len(suffixes)
            if room < 0:
                raise RacsProtocolError(f"a list names more than {MAX_SEIDS} secure elements")
            seids += map(check_seid, suffixes)
    except RacsValueError as error:
        raise RacsProtocolError(f"a list of secure elements is malformed: {error}") from None
    return seids


def _range(item: str, room: int) -> range:
    first, separator, last = item.partition("-")
    if _NUMBER.fullmatch(first) is None or (separator and _NUMBER.fullmatch(last) is None):
        raise RacsProtocolError("a list of secure elements is malformed")
    numbers = range(int(first), int(last if separator else first) + 1)
    if not 0 < len(numbers) <= room:
        raise RacsProtocolError(f"a list names none, or more than {MAX_SEIDS} secure elements")
    return numbers
