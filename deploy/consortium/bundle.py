"""Build the app as one file, a Flower App Bundle (FAB) of the common, client and server packages.

It is built once, when a consortium is provisioned, and its SHA-256 is what sites approve. It holds the same
bytes as ``flwr run`` would make of a checkout of the same sources, since it depends on names and contents
only and its entries have a fixed date in place of the files' times.
"""

import importlib
import io
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

from common.errors import UserError

PACKAGES = ("common", "client", "server")
_PACKAGED = "app.toml"
"""pyproject.toml inside an installed wheel (pyproject.toml's own force-include puts it there)."""


def build_bundle() -> bytes:
    """Build the app of the running fedbags, from a checkout or an installed wheel.

    Raises:
        UserError: Flower cannot build it (too large, say), or the installation is incomplete.
    """
    from flwr.cli.build import build_fab_from_files

    sources: dict[str, bytes | Path] = {"pyproject.toml": _project_file()}
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            sources[f"{package}/{path.relative_to(folder).as_posix()}"] = path
    try:
        content, _ = build_fab_from_files(sources)
    except ValueError as error:
        raise UserError(f"Flower cannot bundle the app: {error}") from error
    return content


def unpack_bundle(content: bytes, folder: Path) -> None:
    """Write a bundle's files below a folder, from which ``flwr run`` makes the same bundle again.

    Args:
        content: a bundle of our own making (its names are not checked).
        folder: is made where missing.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)


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
        "checkout "
        "of fedbags (`pip install -e .`), or from a wheel built from one"
    )
