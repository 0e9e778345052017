"""Settings that are read again while a daemon runs (SIGHUP): what differs, and what is said of it.

A file that cannot be used changes nothing: the daemon goes on as it was, and its log says what is wrong with the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import BaseModel

from secfunet.errors import SecFuNetError

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)


def changed_keys(before: BaseModel, after: BaseModel, within: str = "") -> Iterator[str]:
    """The keys whose values differ, as a person writes them (``limits.slot_queue``); a list is one value."""
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, BaseModel) and isinstance(new, BaseModel) and type(old) is type(new):
            yield from changed_keys(old, new, f"{within}{name}.")
        elif not alike(old, new):
            yield f"{within}{name}"


def alike(old: object, new: object) -> bool:
    """Whether two values are the same in a file; what a program keeps in them beside that (a typed PIN) does not count."""
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        return type(old) is type(new) and old.model_dump() == new.model_dump()
    if isinstance(old, tuple) and isinstance(new, tuple):
        return len(old) == len(new) and all(map(alike, old, new))
    return old == new


@dataclass
class Reloaded:
    """What came of it. ``changed``: a few words each; ``needs_restart``: keys whose new values count only then."""

    changed: list[str] = field(default_factory=list)
    needs_restart: list[str] = field(default_factory=list)

    def say(self) -> None:
        """Puts it into the log."""
        facts = {"changed": self.changed, "needs_restart": self.needs_restart}
        if self.needs_restart:
            log.warning("the settings were read again; some count only after a restart", extra=facts)
        else:
            log.info("the settings were read again", extra=facts)


class Rereading(Generic[Model]):
    """The settings in force, and the way to read them again."""

    def __init__(self, settings: Model, read: Callable[[], Model] | None = None) -> None:
        self.settings = settings
        self._read = read

    def again(self) -> Model | None:
        """What the file says now; None if it cannot be used, or there is none: everything stays as it was."""
        if self._read is None:
            return None
        try:
            return self._read()
        except SecFuNetError as error:
            log.error("the new settings cannot be used, everything stays as it was: %s", error)
            return None

    def adopt(self, new: Model, keys: Sequence[str]) -> list[str]:
        """Takes the values of these keys (``log_level``, ``radius.clients``) over; returns those that still differ from the file."""
        for key in keys:
            self.settings = _with(self.settings, new, key.split("."))
        return list(changed_keys(self.settings, new))


def _with(into: Model, of: BaseModel, key: Sequence[str]) -> Model:
    """``into`` with the value that ``of`` has there; as it was if only one of the two has that table."""
    name, *inner = key
    old, new = getattr(into, name), getattr(of, name)
    if inner:
        if not isinstance(old, BaseModel) or not isinstance(new, BaseModel):
            return into
        new = _with(old, new, inner)
    return into.model_copy(update={name: new})
