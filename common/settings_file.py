"""Read and write settings files: TOML that is checked against a frozen model, with every fault named.

A reader names the file, the key and the nearest known key; a writer puts every key's meaning above it. The
module knows nothing of what the keys mean.
"""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class Section(BaseModel):
    """Serve as the base of a frozen table of settings that refuses unknown keys.

    Keys are written in kebab-case outside Python.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        protected_namespaces=(),
    )


_Model = TypeVar("_Model", bound=Section)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML (a key given twice, say).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def validated(model: type[_Model], data: Mapping[str, Any], what: Path | str) -> _Model:
    """Return a table as a model.

    Args:
        model: what the table must be.
        data: the table.
        what: the file, or what takes its place, for the message.

    Raises:
        ConfigError: names every unknown (with the nearest known one), missing or faulty key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{what} is faulty:\n" + "\n".join(_faults(error, model))) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that suggests the nearest known word, or nothing where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def commented(section: Section, header: str = "") -> str:
    """Return a model as TOML text, plain keys before tables, each key with its description above it."""
    lines, tables = [header] if header else [], []
    dumped = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key = field.alias or name
        value = getattr(section, name)
        if isinstance(value, Section):
            tables.append(commented(value, f"\n[{key}]"))
            continue
        lines += [f"# {field.description}"] if field.description else []
        lines.append(tomli_w.dumps({key: dumped[key]}).rstrip())
    return "\n".join(lines) + "\n" + "".join(tables)


def _faults(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for fault in error.errors():
        place = [str(part) for part in fault["loc"] if part != "[key]"]
        key = ".".join(place)
        if fault["type"] == "extra_forbidden":
            yield f"  unknown key {key!r}{_suggestion(model, place)}"
        elif fault["type"] == "missing":
            yield f"  key {key!r} is missing"
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            about = key if isinstance(fault["input"], dict) else f"{key} = {fault['input']!r}"
            yield f"  {about}: {reason}" if about else f"  {reason}"


def _suggestion(model: type[BaseModel], place: list[str]) -> str:
    """Suggest a key of the same table that is spelled nearly so, or one of this name in another table."""
    *tables, last = place
    known = {key: key.split(".") for key in _keys(model)}
    siblings = {parts[-1]: key for key, parts in known.items() if parts[:-1] == tables}
    if near := difflib.get_close_matches(last, siblings, n=1):
        return f"; did you mean {siblings[near[0]]!r}?"
    return "".join([f"; did you mean {key!r}?" for key, parts in known.items() if parts[-1] == last][:1])


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of a model and of the tables in it, dotted."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{key}.")
