"""What is wrong with a value in a settings file, in the words of TOML: text, list, whole number, table."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from secfunet.service.toml_lines import Location

_KINDS: Final[dict[str, str]] = {
    "string_type": "text in quotes",
    "string_sub_type": "text in quotes",
    "path_type": 'a path, as text in quotes ("/etc/secfunet/name")',
    "tuple_type": 'a list, in brackets (["one", "two"])',
    "list_type": 'a list, in brackets (["one", "two"])',
    "set_type": 'a list, in brackets (["one", "two"])',
    "frozen_set_type": 'a list, in brackets (["one", "two"])',
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number that is not this large",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number, neither infinite nor nan",
    "bool_type": "true or false, without quotes",
    "bool_parsing": "true or false, without quotes",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "bytes_type": "text in quotes",
}
"""By pydantic's name of the problem."""
_LARGEST_SHOWN: Final = 10**60  # Python itself refuses to write a number of thousands of digits
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def wanted(problem: Mapping[str, Any], forms: Mapping[str, str]) -> str:
    """One sentence for a problem that pydantic found. ``forms``: what patterns mean."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", problem["msg"]))
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {kind_of(value)}"
    match kind:
        case "literal_error" | "enum":
            return f"must be {str(context['expected']).replace(chr(39), chr(34))}; it is {in_toml(value)}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}; it is {in_toml(value)}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}; it is {in_toml(value)}"
        case "greater_than":
            return f"must be more than {context['gt']:g}; it is {in_toml(value)}"
        case "less_than":
            return f"must be less than {context['lt']:g}; it is {in_toml(value)}"
        case "string_pattern_mismatch":
            meaning = forms.get(str(context["pattern"]))
            return (
                f"must be {meaning}; it is {in_toml(value)}"
                if meaning
                else f"{in_toml(value)} does not have the right form"
            )
        case "string_too_short":
            return (
                "must not be empty"
                if context["min_length"] == 1
                else f"must have at least {context['min_length']} characters"
            )
        case "string_too_long":
            return f"must have at most {context['max_length']} characters; it has {len(str(value))}"
        case "too_short":
            return (
                "must not be empty"
                if context["min_length"] == 1
                else f"must have at least {context['min_length']} entries"
            )
        case "too_long":
            return f"must have at most {context['max_length']} entries"
    return str(problem["msg"])


def kind_of(value: object) -> str:
    """What TOML calls a value of this type."""
    match value:
        case bool():
            return "true or false"
        case str():
            return "text"
        case int():
            return "a whole number"
        case float():
            return "a number with a fraction"
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case datetime.date() | datetime.time():
            return "a date or time"
    return "this value"


def in_toml(value: object) -> str:
    """A value as one would write it; long ones are cut."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(in_toml(one) for one in value[:4]) + (", …]" if len(value) > 4 else "]")
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, int) and abs(value) >= _LARGEST_SHOWN:
        return "far larger" if value > 0 else "far smaller"
    text = (
        json.dumps(str(value), ensure_ascii=False) if isinstance(value, str | Path) else json.dumps(value, default=str)
    )
    return text if len(text) <= 80 else f"{text[:76]}…{text[-1]}"


def name_of(location: Location) -> str:
    """As a person finds it: ``'limits.batch'``, ``'rule' 2, 'schemes'``; entries of lists are counted from 1."""
    said: list[str] = []
    keys: list[str] = []
    for part in location:
        if isinstance(part, int):
            said.append(f"'{'.'.join(keys)}' {part + 1}" if keys else f"{said.pop()}, {part + 1}")
            keys = []
        else:
            keys.append(part if _BARE_KEY.fullmatch(part) else in_toml(part))
    return ", ".join([*said, f"'{'.'.join(keys)}'"] if keys else said)
