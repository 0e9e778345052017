"""Settings: one TOML file, validated whole. Every problem is said at once, with file, line and key, in the words of TOML."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from secfunet.errors import SecFuNetError
from secfunet.service.toml_lines import Location, TomlLines
from secfunet.service.toml_words import in_toml, name_of, wanted

_FORMS: Final = "forms"


class SettingsError(SecFuNetError):
    """The settings cannot be used; ``problems`` has one sentence each, which begins with the file and, where there is one, the line."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.path = path
        self.problems = problems


class Settings(BaseModel):
    """Base of every settings model: immutable, no unknown keys, defaults validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    if "\0" in str(path):
        raise ValueError("a path cannot hold a zero byte")
    folder = (info.context or {}).get("folder")
    # normpath: "grid/../cards" would be shown to people in every message.
    return Path(os.path.normpath(Path(folder).absolute() / path)) if folder is not None else path


FilePath = Annotated[Path, AfterValidator(_beside_the_file)]
"""A path in a settings file: a relative one is relative to the file's folder."""

Model = TypeVar("Model", bound=BaseModel)


def form(pattern: str, words: str) -> Any:
    """A Field for a text of that ``pattern``; ``words`` says what it must be, to a person whose text does not match."""
    return Field(pattern=pattern, json_schema_extra={_FORMS: {pattern: words}})


def load_settings(model: type[Model], path: Path) -> Model:
    """Reads ``path`` into ``model``. Relative paths in fields of type FilePath are relative to its folder.

    Raises SettingsError with every problem at once: unreadable file, bad TOML, unknown keys (with a hint), wrong values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(path, [f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise SettingsError(path, [f"{path}: not UTF-8 text (byte {error.start})"]) from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(path, [_not_toml(path, str(error))]) from error
    except ValueError as error:  # tomllib passes on what int() says of thousands of digits
        raise SettingsError(path, [f"{path}: not valid TOML: a number has too many digits"]) from error
    except RecursionError:
        raise SettingsError(path, [f"{path}: not valid TOML: tables or lists lie too deep in each other"]) from None
    return validate_settings(model, raw, path, TomlLines(text))


def validate_settings(model: type[Model], raw: dict[str, Any], path: Path, lines: TomlLines | None = None) -> Model:
    """Validates already parsed TOML; see load_settings."""
    try:
        return model.model_validate(raw, context={"folder": path.parent})
    except ValidationError as error:
        found = lines or TomlLines("")
        said = [_problem(model, problem, path, found) for problem in error.errors()]
        raise SettingsError(path, list(dict.fromkeys(said))) from None


def _not_toml(path: Path, message: str) -> str:
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message)
    if match is None:
        return f"{path}: not valid TOML: {message[:1].lower()}{message[1:]}"
    return f"{path}:{match[2]}: not valid TOML: {match[1][:1].lower()}{match[1][1:]} (column {match[3]})"


def _problem(model: type[BaseModel], problem: Any, path: Path, lines: TomlLines) -> str:
    location, field = _follow(model, problem["loc"])
    if problem["type"] == "extra_forbidden":
        # The key that is not known always stands in the file, however it is written.
        location, field = (*_follow(model, problem["loc"][:-1])[0], problem["loc"][-1]), None
    line = lines.line_of(location)
    where = f"{path}:{line}" if line is not None else f"{path}"
    return f"{where}: {_sentence(model, problem, location, field)}"


def _sentence(model: type[BaseModel], problem: Any, location: Location, field: FieldInfo | None) -> str:
    name = name_of(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(model, problem["loc"])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name}: {hint}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    said = wanted(problem, _forms_of(model))
    if not location:
        return said
    example = _example(field, location)
    return f"{name}: {said}" + (f"; for example {example}" if example else "")


def _follow(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[Location, FieldInfo | None]:
    """The part of a location that stands in the file: keys of tables and places in lists; and the field of its last key."""
    current: type[BaseModel] | None = model
    found: list[str | int] = []
    field: FieldInfo | None = None
    for index, part in enumerate(location):
        if isinstance(part, int):
            found.append(part)
            continue
        is_last = index == len(location) - 1
        names = {} if current is None else {info.alias or name: info for name, info in current.model_fields.items()}
        if part in names:
            field = names[part]
            found.append(part)
            current = _model_in(field.annotation)
        elif is_last and current is not None and not part.startswith(("function-", "tagged-")) and part.isidentifier():
            found.append(part)
            field = None
    return tuple(found), field


def _example(field: FieldInfo | None, location: Location) -> str:
    """The default, if it is a value that somebody could write."""
    if field is None or isinstance(location[-1], int):
        return ""
    default = field.get_default(call_default_factory=False)
    if isinstance(default, tuple) and type(default) is not tuple:
        default = str(default)  # an address, which is written as one text
    if isinstance(default, bool | int | float | str | Path) or (isinstance(default, tuple) and default):
        return f"{location[-1]} = {in_toml(default)}"
    return ""


def _forms_of(model: type[BaseModel]) -> dict[str, str]:
    """What patterns mean, of a model and all that it has."""
    found: dict[str, str] = {}

    def gather(annotation: Any, seen: set[Any]) -> None:
        for metadata in getattr(annotation, "__metadata__", ()):
            if isinstance(metadata, FieldInfo) and isinstance(metadata.json_schema_extra, dict):
                found.update(metadata.json_schema_extra.get(_FORMS, {}))  # type: ignore[arg-type]
        for argument in getattr(annotation, "__args__", ()):
            gather(argument, seen)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen.add(annotation)
            for field in annotation.model_fields.values():
                if isinstance(field.json_schema_extra, dict):
                    found.update(field.json_schema_extra.get(_FORMS, {}))  # type: ignore[arg-type]
                gather(field.annotation, seen)

    gather(model, set())
    return found


def _keys_beside(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that the table holding ``location`` may have."""
    current: type[BaseModel] = model
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        nested = _model_in(field.annotation) if field is not None else None
        if nested is not None:
            current = nested
    return [field.alias or name for name, field in current.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
