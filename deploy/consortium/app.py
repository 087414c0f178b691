"""Bundle the app, describe what another app would change at a site, and record the app that it approves.

An app is a Flower App Bundle (FAB), a zip file of the common, client and server packages. It is built once,
when a consortium is provisioned, and its SHA-256 is what sites approve. It holds the same bytes as ``flwr
run`` would make of a checkout of the same sources, since it depends on names and contents only and its
entries have a fixed date in place of the files' times. Another's app may be hostile: it is read without being
unpacked, nothing of it is run, and names and values are shown with everything unprintable escaped.
"""

import difflib
import importlib
import io
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from common.config import flatten
from common.errors import UserError, require_file
from common.parts import is_shipped
from common.text import visible
from deploy.consortium.kit import app_hash
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy.flower import internals

_PARTS_INIT = "added_parts/__init__.py"
_PACKAGED = "app.toml"
"""pyproject.toml inside an installed wheel (pyproject.toml's own force-include puts it there)."""


@dataclass(frozen=True)
class AddedParts:
    """Hold what others' parts bring into an app."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Path in the app, below ``added_parts/``, to content."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Defaults of their settings by the part's name."""

    def and_also(self, other: "AddedParts", package: str) -> "AddedParts":
        """Return these with others in place of what the package of this name had brought."""
        kept = {
            path: text for path, text in self.files.items() if not path.startswith(f"added_parts/{package}/")
        }
        return AddedParts({**kept, **other.files}, {**self.settings, **other.settings})


def build_bundle(added: AddedParts | None = None) -> bytes:
    """Build the app of the running fedbags, from a checkout or an installed wheel.

    Args:
        added: others' parts that the app holds beside its own.

    Raises:
        UserError: Flower cannot build it (too large, say), or the installation is incomplete.
    """
    project = _project_file()
    patterns = tomllib.loads(project.decode())["tool"]["flwr"]["app"]["fab-include"]
    sources: dict[str, bytes | Path] = {}
    for package, _, pattern in (included.partition("/") for included in patterns):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.glob(pattern)):
            sources[f"{package}/{path.relative_to(folder).as_posix()}"] = path
    if added and added.files:
        # A package of the same name elsewhere at a site would win over a folder without this file.
        sources |= {_PARTS_INIT: b'"""Hold the parts of others."""\n', **added.files}
        project = project.replace(b"fab-include = [", b'fab-include = ["added_parts/**/*.py", ', 1)
        if added.settings:
            tables = {"tool": {"flwr": {"app": {"config": {"parts": added.settings}}}}}
            project += b"\n" + tomli_w.dumps(tables).encode()
    sources["pyproject.toml"] = project
    try:
        return internals.build_app(sources)
    except ValueError as error:
        raise UserError(f"Flower cannot bundle the app: {error}") from error


def _project_file() -> bytes:
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    for path in (checkout, files("deploy.consortium") / _PACKAGED):
        if path.is_file():
            text = path.read_bytes()
            # In an installed wheel, a pyproject.toml two folders up would belong to something else.
            if tomllib.loads(text.decode()).get("project", {}).get("name") == "fedbags":
                return text
    raise UserError(
        "this installation of fedbags has no description of its app (pyproject.toml): provision from a "
        "checkout of fedbags (`pip install -e .`), or from a wheel built from one"
    )


_PROJECT_FILE = "pyproject.toml"
_TABLE = "tool.flwr.app."
_MANIFEST = ".info/"
"""Flower's list of the files: it follows from them, and is deleted when an app is installed."""

_MAX_UNPACKED = 64 * 2**20
"""Bytes; Flower's limit for the bundle itself is 10 MiB."""


@dataclass(frozen=True)
class _App:
    """Hold an app's bytes and the files in them.

    Attributes:
        content: the bundle.
        files: path inside the app to its bytes.
    """

    content: bytes
    files: dict[str, bytes]

    @property
    def hash(self) -> str:
        """Return the SHA-256 that a kit pins to approve this app."""
        return app_hash(self.content)

    @cached_property
    def added_parts(self) -> AddedParts:
        """Return the parts of others that the app holds."""
        files = {
            path: text
            for path, text in self.files.items()
            if path.startswith("added_parts/") and path != _PARTS_INIT
        }
        table = tomllib.loads(self.files[_PROJECT_FILE].decode())["tool"]["flwr"]["app"]["config"]
        tables = table.get("parts", {}).items()
        return AddedParts(
            files, {name: keys for name, keys in tables if not is_shipped(name)} if files else {}
        )

    @cached_property
    def settings(self) -> dict[str, str]:
        """Return pyproject.toml as a flat table of dotted key to value as text.

        Empty where the app has none that can be read.
        """
        try:
            table = tomllib.loads(self.files.get(_PROJECT_FILE, b"").decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            return {}
        return {key: repr(value) for key, value in flatten(table).items()}


@dataclass(frozen=True)
class _FileChange:
    """Describe the change of one file.

    The numbers of lines are 0 for a file that is not text.
    """

    path: str
    change: str
    """added, removed or changed"""
    lines_added: int
    lines_removed: int
    text: bool = True


@dataclass(frozen=True)
class _SettingChange:
    """Describe the change of one key of pyproject.toml.

    A value is None on the side that does not have the key.
    """

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class _Changes:
    """Hold all that differs between two apps."""

    files: tuple[_FileChange, ...]
    configuration: tuple[_SettingChange, ...]
    """Defaults of a run, which a server may override within the app's own bounds."""
    components: tuple[_SettingChange, ...]
    """Where the app is entered."""
    project: tuple[_SettingChange, ...]
    """The rest of pyproject.toml: name, version, dependencies, what is bundled."""
    unchanged: int
    """Files that are the same in both."""

    def to_json(self) -> dict[str, Any]:
        """Return the changes as plain values for ``--json``."""
        return asdict(self)


def read_app(path: Path) -> _App:
    """Read an app from a bundle, or from a folder, which is bundled as ``flwr run`` would.

    Raises:
        UserError: neither, or not a sound bundle.
    """
    if path.is_dir():
        try:
            return read_bundle(internals.build_app_of_folder(path), str(path))
        except ValueError as error:
            raise UserError(f"{path} is not the folder of a Flower app: {error}") from error
    require_file(path, "the app", "Give a .fab file, or the folder of a Flower app.")
    return read_bundle(path.read_bytes(), str(path))


def read_bundle(content: bytes, name: str) -> _App:
    """Read an app from its bytes without unpacking it to the disk.

    Raises:
        UserError: not a zip file, too large, or its names are not plain paths, each once.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            # A small archive can unpack to gigabytes, so sizes are summed before decompressing.
            if sum(entry.file_size for entry in entries) > _MAX_UNPACKED:
                raise UserError(f"{name} unpacks to more than {_MAX_UNPACKED // 2**20} MiB: not an app")
            names = [entry.filename for entry in entries]
            # What is shown must be what would be unpacked. A name given twice, or a path that leads out of
            # the folder, would be shown otherwise than it unpacks.
            if len(set(names)) < len(names) or not all(map(_plain, names)):
                raise UserError(f"{name} is not a sound app: a file is in it twice, or lies outside of it")
            files = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a Flower app bundle (.fab): {error}") from error
    return _App(content, {path: text for path, text in files.items() if not path.startswith(_MANIFEST)})


def compare_apps(old: _App | None, new: _App) -> _Changes:
    """Return the differences between two apps, with all of ``new`` as added where there is no old one."""
    before = old.files if old else {}
    changes, same = [], 0
    for path in sorted((before.keys() | new.files.keys()) - {_PROJECT_FILE}):
        first, second = before.get(path), new.files.get(path)
        if first == second:
            same += 1
        else:
            changes.append(_file_change(path, first, second))
    settings = _setting_changes(old.settings if old else {}, new.settings)
    config, components = f"{_TABLE}config.", f"{_TABLE}components."
    return _Changes(
        files=tuple(changes),
        configuration=_below(settings, config),
        components=_below(settings, components),
        project=tuple(change for change in settings if not change.key.startswith((config, components))),
        unchanged=same,
    )


def in_words(changes: _Changes) -> list[str]:
    """Return the changes as lines of text for a person to read."""
    lines = []
    for change in changes.files:
        size = f"+{change.lines_added} -{change.lines_removed} lines" if change.text else "not a text file"
        lines.append(f"  {change.change:<8} {visible(change.path)}  ({size})")
    lines = [f"Files ({changes.unchanged} are as before):", *(lines or ["  none differ"])]
    for title, part in (
        ("Components (where the app is entered)", changes.components),
        ("Configuration (defaults of a run)", changes.configuration),
        ("Project (name, version, dependencies)", changes.project),
    ):
        lines += [f"{title}:", *(_setting_in_words(change) for change in part)] if part else []
    return lines


def unified_diff(old: _App | None, new: _App) -> list[str]:
    """Return every changed line, as ``diff -u`` shows it."""
    before = old.files if old else {}
    lines: list[str] = []
    for path in sorted(before.keys() | new.files.keys()):
        first, second = (_lines(side.get(path, b"")) or [] for side in (before, new.files))
        lines += difflib.unified_diff(first, second, f"approved/{path}", f"new/{path}", lineterm="")
    return [visible(line) for line in lines]


def _plain(name: str) -> bool:
    parts = name.split("/")
    return "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(parts)


def _lines(content: bytes) -> list[str] | None:
    """Return the lines of a text file, or None for content that is not UTF-8 text."""
    try:
        return content.decode().splitlines()
    except UnicodeDecodeError:
        return None


def _file_change(path: str, first: bytes | None, second: bytes | None) -> _FileChange:
    change = "added" if first is None else "removed" if second is None else "changed"
    old, new = _lines(first or b""), _lines(second or b"")
    if old is None or new is None:
        return _FileChange(path, change, 0, 0, text=False)
    # With autojunk, lines that are frequent in a long file are not matched, and are counted as changed.
    steps = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    edits = [step[1:] for step in steps if step[0] != "equal"]
    return _FileChange(
        path, change, sum(j2 - j1 for _, _, j1, j2 in edits), sum(i2 - i1 for i1, i2, _, _ in edits)
    )


def _setting_changes(old: dict[str, str], new: dict[str, str]) -> list[_SettingChange]:
    return [
        _SettingChange(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _below(settings: list[_SettingChange], prefix: str) -> tuple[_SettingChange, ...]:
    return tuple(
        _SettingChange(change.key.removeprefix(prefix), change.before, change.after)
        for change in settings
        if change.key.startswith(prefix)
    )


def _setting_in_words(change: _SettingChange) -> str:
    key, before, after = (visible(text or "") for text in (change.key, change.before, change.after))
    if change.before is None:
        return f"  added    {key} = {after}"
    if change.after is None:
        return f"  removed  {key} (was {before})"
    return f"  changed  {key}: {before} -> {after}"
