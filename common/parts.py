"""Register the parts that runs are made of, explained and measured by, each under its kind and name.

A part is one module with a ``Part`` in it. The product's own parts have one line each in ``_SHIPPED``. Parts
of others come in two ways. A coordinator copies their source into the app, below ``added_parts/``, so that
the hash that a hospital approves covers it. On a laptop, ``discover`` also admits installed packages, which
name their parts as entry points of the group ``fedbags.parts``; no hospital calls it, for no hash covers
such code.

Modules of parts are imported when they are first asked for, so reading a configuration loads no torch.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.settings_file import Section, nearest


class Kind(StrEnum):
    """Name a place in a run that parts can take."""

    BACKBONE = "backbone"
    BLOCK = "block"
    HEAD = "head"
    TERM = "term"
    STRATEGY = "strategy"
    EXPLAINER = "explainer"
    PROBE = "probe"


class NoSettings(Section):
    """Serve as the settings of a part that has none."""


@dataclass(frozen=True)
class Part:
    """Describe one part, which ``build`` makes.

    What ``build`` takes and gives depends on the kind: ``common.model.interfaces`` has the protocols of a
    backbone, block and head, ``client.terms.base`` that of a term, ``deploy.explain`` that of an explainer,
    and ``deploy.compare.probes`` that of a probe. The last two get their settings alone, at their defaults.
    """

    kind: Kind
    name: str
    """In a configuration; letters, digits, ``-`` and ``_``."""
    build: Callable[..., Any]
    source: str
    """The paper and the licence that it comes from; shown by ``fedbags parts list``."""
    settings: type[Section] = NoSettings
    """Its keys, as the table ``[parts.NAME]`` of a configuration."""
    modules: Callable[..., Any] | None = None
    """For a term: builds the module of its own that is trained and sent with the model, or None."""


class _WithSettings(str):
    """Mark the place of a part that has keys: the others need not be imported to know that they have none."""

    __slots__ = ()


_SHIPPED: Mapping[Kind, Mapping[str, str]] = {
    Kind.BACKBONE: {
        "resnet-small": "common.model.resnet_small:PART",
        "colour-histogram": "common.model.colour_histogram:PART",
        "gabor": "common.model.features.gabor:PART",
        "efficientnet-lite0": "common.model.features.efficientnet_lite:LITE0",
        "efficientnet-lite1": "common.model.features.efficientnet_lite:LITE1",
        "efficientnet-lite2": "common.model.features.efficientnet_lite:LITE2",
    },
    Kind.BLOCK: {"dictionary": "common.model.dictionary:PART"},
    Kind.HEAD: {"linear": "common.model.heads:LINEAR"},
    Kind.TERM: {
        "matching": "client.terms.proportions:MATCHING",
        "codes": "client.terms.proportions:CODES",
        "refined": "client.terms.proportions:REFINED",
        "labels": "client.terms.labels:PART",
        "vat": _WithSettings("client.terms.vat:PART"),
        "rot": _WithSettings("client.terms.rot:PART"),
        "llpfc": _WithSettings("client.terms.llpfc:PART"),
        "easyllp": "client.terms.easyllp:PART",
        "mixbag": _WithSettings("client.terms.mixbag:PART"),
    },
    Kind.STRATEGY: {
        "fedavg": "server.strategies:FEDAVG",
        "fedprox": "server.strategies:FEDPROX",
        "fedpals": "server.strategies:FEDPALS",
        "fedavgm": "server.strategies:FEDAVGM",
        "fedadam": "server.strategies:FEDADAM",
        "fedyogi": "server.strategies:FEDYOGI",
        "median": "server.strategies:MEDIAN",
        "trimmed-mean": "server.strategies:TRIMMED_MEAN",
        "krum": "server.strategies:KRUM",
    },
    Kind.EXPLAINER: {"grad-cam": "deploy.explain:PART"},
    Kind.PROBE: {"recall": "deploy.compare.probes:PART"},
}
_WITH_SETTINGS = frozenset(
    name for lines in _SHIPPED.values() for name, place in lines.items() if isinstance(place, _WithSettings)
)
_ADDED = Path(__file__).parents[1] / "added_parts"
"""Where ``fedbags parts add`` puts the source of others within the app."""
_GROUP = "fedbags.parts"
_registered: dict[tuple[Kind, str], Part] = {}
_discovering = False


def part(kind: Kind, name: str) -> Part:
    """Return a part by its name.

    Raises:
        ConfigError: there is none of this name, or its module does not hold it.
    """
    if found := _registered.get((kind, name)):
        return found
    if where := _SHIPPED[kind].get(name):
        module, _, attribute = where.partition(":")
        shipped: Part = getattr(importlib.import_module(module), attribute)
        return shipped
    for other in _of_others():
        if (other.kind, other.name) == (kind, name):
            return other
    known = names(kind)
    raise ConfigError(
        f"there is no {kind.value} {name!r}{nearest(name, known)}\n"
        f"Known: {', '.join(known) or 'none'}. `fedbags parts list` tells where each comes from."
    )


def names(kind: Kind) -> list[str]:
    """Return the names of all parts of a kind, the product's own first."""
    others = [other.name for other in [*_registered.values(), *_of_others()] if other.kind is kind]
    return list(dict.fromkeys([*_SHIPPED[kind], *others]))


def is_shipped(name: str) -> bool:
    """Return True if the product itself brings a part of this name."""
    return name in shipped_names()


def shipped_names() -> frozenset[str]:
    """Return the names of all parts that the product itself brings."""
    return frozenset(name for lines in _SHIPPED.values() for name in lines)


def shipped_with_settings() -> list[Part]:
    """Return the product's own parts that have keys in a configuration."""
    lines = [(kind, name) for kind, lines in _SHIPPED.items() for name in lines]
    return [part(kind, name) for kind, name in lines if name in _WITH_SETTINGS]


def settings_of(name: str) -> type[Section]:
    """Return the type of the table ``[parts.NAME]``.

    Raises:
        ConfigError: no part of this name has keys.
    """
    if not is_shipped(name) or name in _WITH_SETTINGS:
        for kind in Kind:
            if name in names(kind) and (found := part(kind, name)).settings is not NoSettings:
                return found.settings
    raise ConfigError(f"no part {name!r} has settings of its own")


def has_settings(name: str) -> bool:
    """Return True if a part of this name has keys in a configuration."""
    if is_shipped(name):
        return name in _WITH_SETTINGS
    return any(name in names(kind) and part(kind, name).settings is not NoSettings for kind in Kind)


def register_part(added: Part) -> None:
    """Make a part of the running program known, as a notebook or a test does.

    Raises:
        ConfigError: the name is taken.
    """
    taken = added.name in names(added.kind)
    if taken and _registered.get((added.kind, added.name)) != added:
        raise ConfigError(f"there is a {added.kind.value} {added.name!r} already: choose another name")
    _registered[added.kind, added.name] = added


def forget(added: Part) -> None:
    """Take back what ``register_part`` did."""
    _registered.pop((added.kind, added.name), None)


def discover() -> None:
    """Admit the parts of installed packages, for simulations: a hospital runs only what it approved."""
    global _discovering
    _discovering = True
    _of_others.cache_clear()


def installed() -> Iterable[EntryPoint]:
    """Return what installed packages name as their parts."""
    return entry_points(group=_GROUP)


def parts_of(module: Any, where: str) -> list[Part]:
    """Return the tuple ``PARTS`` of a module or package of parts.

    Raises:
        ConfigError: it has none, or something else is in it.
    """
    found = getattr(module, "PARTS", None)
    if not isinstance(found, tuple) or not all(isinstance(each, Part) for each in found):
        raise ConfigError(f"{where} names no parts: it needs PARTS, a tuple of common.parts.Part")
    return list(found)


def provenance(used: Iterable[str]) -> list[dict[str, str]]:
    """Return where the parts of these names come from that the product does not bring itself.

    Returns:
        ``kind``, ``name``, ``package``, its ``version`` (empty within an app), ``sha256`` of its source.
    """
    found = []
    for other in [*_registered.values(), *_of_others()]:
        if other.name in set(used):
            module = other.build.__module__
            top = (
                ".".join(module.split(".")[:2])
                if module.startswith("added_parts.")
                else module.partition(".")[0]
            )
            versions = packages_distributions().get(top, [])
            found.append(
                {
                    "kind": other.kind.value,
                    "name": other.name,
                    "package": top,
                    "version": version(versions[0]) if versions else "",
                    "sha256": _source_hash(top, other.build),
                }
            )
    return found


def _source_hash(package: str, build: Callable[..., Any]) -> str:
    """Return the SHA-256 over the names and contents of a package's Python files, or of the one file."""
    spec = importlib.util.find_spec(package)
    # A program or notebook is no module that can be found; its file is that of the function.
    file = Path(spec.origin if spec and spec.origin else inspect.getfile(build))
    whole = spec is not None and spec.submodule_search_locations
    files = sorted(file.parent.rglob("*.py")) if whole else [file]
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(file.parent).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@functools.cache
def _of_others() -> tuple[Part, ...]:
    found = []
    for folder in sorted(_ADDED.glob("*/__init__.py")):
        name = folder.parent.name
        found += parts_of(
            importlib.import_module(f"added_parts.{name}"), f"the added package added_parts/{name}"
        )
    if _discovering:
        for entry in installed():
            found += parts_of(entry.load(), f"the installed package {entry.value}")
    return tuple(found)
