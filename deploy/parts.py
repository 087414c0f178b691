"""Read the parts of installed packages, and copy their source into an app.

A package of others' parts names its module as an entry point of the group ``fedbags.parts``. A hospital runs
only the app whose hash it approved, so what a coordinator adds is copied into the app, below its folder
``added_parts``: every line of it shows in ``fedbags site approve --diff``. Weights never ride in an app.
"""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

from common import parts
from common.errors import UserError
from common.parts import Kind, Part
from common.settings_file import nearest

_GROUP = "fedbags.parts"
_OURS = frozenset({"common", "client", "server"})
"""What a part may import of fedbags: what is in the app."""
_HOW = "docs/parts.md says how a package of parts is made."


@dataclass(frozen=True)
class Package:
    """Hold an installed package of parts."""

    name: str
    """Of its module: the name of the folder in the app."""
    version: str
    license: str
    files: Mapping[str, bytes]
    """Path below ``added_parts/NAME`` to its content."""
    parts: tuple[Part, ...]
    imports: tuple[str, ...]
    """Top-level modules outside of itself, the standard library and fedbags: a site must have them."""

    def in_app(self) -> dict[str, bytes]:
        """Return the files by their paths in an app."""
        return {f"added_parts/{self.name}/{path}": content for path, content in self.files.items()}

    def in_words(self) -> list[str]:
        """Return one line a part, as the coordinator and a site's owner read it."""
        needs = ", ".join(self.imports) or "nothing else"
        return [
            f"{part.kind.value} {part.name!r} of {self.name} {self.version} ({self.license}): {part.source}; "
            f"imports {needs}"
            for part in self.parts
        ]


def read_package(name: str) -> Package:
    """Read an installed package of parts.

    Args:
        name: of the distribution, as pip knows it.

    Raises:
        UserError: it is not installed, names no parts, has no licence, is not pure Python, or imports itself
            by its own name, which would not be the copy in the app.
    """
    found = _distribution(name)
    entries = [entry for entry in found.entry_points if entry.group == _GROUP]
    if len(entries) != 1:
        raise UserError(f"{name} names {len(entries)} entry points of {_GROUP!r}, and one is needed\n{_HOW}")
    module = entries[0].load()
    own = tuple(parts.parts_of(module, f"the package {name}"))
    top, _, below = entries[0].module.partition(".")
    if below:
        raise UserError(
            f"{name}: the entry point is {entries[0].module}, and must be a top-level module\n{_HOW}"
        )
    files = _sources(found, top, Path(str(module.__file__)))
    imported = _imports(files)
    if top in imported:
        raise UserError(
            f"{name} imports itself as {top!r}: in an app it is added_parts.{top}; import relatively\n{_HOW}"
        )
    if wrong := sorted(imported & {"deploy", "fedbags"}):
        raise UserError(
            f"{name} imports {wrong[0]}, which is not in an app: use common, client and server\n{_HOW}"
        )
    metadata = found.metadata
    stated = [metadata[key] for key in ("License-Expression", "License") if key in metadata]
    license = next(filter(None, stated), "")
    if not license:
        raise UserError(
            f"{name} states no licence in its metadata, so its source cannot be handed on\n{_HOW}"
        )
    others = imported - _OURS - set(sys.stdlib_module_names)
    return Package(top, found.version, license, files, own, tuple(sorted(others)))


def defaults_of(package: Package) -> dict[str, dict[str, Any]]:
    """Return the defaults of a package's parts that have settings."""
    return {
        part.name: part.settings().model_dump(mode="json", by_alias=True)
        for part in package.parts
        if part.settings is not parts.NoSettings
    }


def rows() -> list[dict[str, Any]]:
    """Return every known part as ``{kind, name, source, settings, from}``."""
    parts.discover()
    found = []
    for kind in Kind:
        for name in parts.names(kind):
            part = parts.part(kind, name)
            settings = [field.alias or key for key, field in part.settings.model_fields.items()]
            origin = "fedbags" if parts.is_shipped(name) else part.build.__module__.partition(".")[0]
            found.append(
                {
                    "kind": kind.value,
                    "name": name,
                    "source": part.source,
                    "settings": settings,
                    "from": origin,
                }
            )
    return found


def _distribution(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        known = [entry.dist.name for entry in parts.installed() if entry.dist]
        hint = nearest(name, known) or f"; packages with parts: {', '.join(known) or 'none'}"
        raise UserError(f"no package {name!r} is installed{hint}") from error


def _sources(found: Distribution, top: str, file: Path) -> dict[str, bytes]:
    """Return the package's own files: Python alone."""
    folder = file.parent if file.name == "__init__.py" else None
    if folder is None:
        return {"__init__.py": file.read_bytes()}
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts or path.name == "py.typed":
            continue
        place = PurePosixPath(path.relative_to(folder).as_posix())
        if place.suffix != ".py":
            raise UserError(
                f"{found.name} brings {top}/{place}, and an app holds Python alone: weights are given as "
                "model.weights, other data belong to the sites"
            )
        files[str(place)] = path.read_bytes()
    return files


def _imports(files: Mapping[str, bytes]) -> set[str]:
    """Return the top-level modules that are imported by absolute names."""
    found = set()
    for content in files.values():
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found
