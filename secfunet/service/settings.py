"""Settings: one TOML file, validated whole; an unknown key is refused with a hint at the one that was probably meant."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from secfunet.errors import SecFuNetError


class SettingsError(SecFuNetError):
    """The settings cannot be used; ``problems`` has one sentence each."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(f"{path}: " + "; ".join(problems))
        self.path = path
        self.problems = problems


class Settings(BaseModel):
    """Base of every settings model: immutable, no unknown keys, defaults validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    # normpath: "grid/../cards" would be shown to people in every message.
    return Path(os.path.normpath(Path(folder).absolute() / path)) if folder is not None else path


FilePath = Annotated[Path, AfterValidator(_beside_the_file)]
"""A path in a settings file: a relative one is relative to the file's folder."""

Model = TypeVar("Model", bound=BaseModel)


def load_settings(model: type[Model], path: Path) -> Model:
    """Reads ``path`` into ``model``. Relative paths in fields of type FilePath are relative to its folder.

    Raises SettingsError with every problem at once: unreadable file, bad TOML, unknown keys (with a hint), wrong values.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(path, [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(path, [f"is no valid TOML: {error}"]) from error
    return validate_settings(model, raw, path)


def validate_settings(model: type[Model], raw: dict[str, Any], path: Path) -> Model:
    """Validates already parsed TOML; see load_settings."""
    try:
        return model.model_validate(raw, context={"folder": path.parent})
    except ValidationError as error:
        raise SettingsError(path, [_sentence(model, raw, problem) for problem in error.errors()]) from None


def _sentence(model: type[BaseModel], raw: dict[str, Any], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _keys_beside(model, problem["loc"])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key '{where}': {hint}"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {problem['msg']}"


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
