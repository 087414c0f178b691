"""Read and write frozen models as TOML files.

A reader names every fault of a file, and a writer puts every key's meaning above it. The module knows nothing
of what the keys mean.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from common.config_tables import Section
from common.errors import ConfigError

Model = TypeVar("Model", bound=Section)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML (a key given twice, say).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def validated(model: type[Model], data: dict[str, Any], path: Path) -> Model:
    """Return a table as a model.

    Raises:
        ConfigError: names every unknown (with the nearest known one), missing or faulty key of the file.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path} is faulty:\n" + "\n".join(_faults(error, model))) from error


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


def _faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    lines = []
    for fault in error.errors():
        *tables, last = (str(part) for part in fault["loc"] if part != "[key]") if fault["loc"] else ("",)
        key = ".".join((*tables, last))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(last, _keys_of(model, tables), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"  unknown key {key!r}{hint}")
        elif fault["type"] == "missing":
            lines.append(f"  key {key!r} is missing")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            about = key if isinstance(fault["input"], dict) else f"{key} = {fault['input']!r}"
            lines.append(f"  {about}: {reason}" if about else f"  {reason}")
    return lines


def _keys_of(model: type[BaseModel], tables: list[str]) -> list[str]:
    for table in tables:
        inner = [
            field.annotation for name, field in model.model_fields.items() if table in (name, field.alias)
        ]
        if not inner or not isinstance(inner[0], type) or not issubclass(inner[0], BaseModel):
            return []
        model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]
