"""Identify the code that runs by the package's version and, in a git checkout, its commit.

This module knows nothing of runs.
"""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIT_SECONDS = 10


def code_version() -> dict[str, str | None]:
    """Return ``{"version", "commit"}`` of the code that is running.

    Each is None where it cannot be known. A checkout with changes that are not committed gives its
    commit followed by ``-dirty``: nobody else has that code.
    """
    try:
        package: str | None = version("fedbags")
    except PackageNotFoundError:
        package = None
    return {"version": package, "commit": git_commit(ROOT)}


def git_commit(root: Path) -> str | None:
    """Return the commit of the checkout whose top folder is ``root``, or None.

    It is None without a checkout or without git. Code that is installed below some other project's checkout
    has no commit of its own.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != root:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None where git fails, is missing or takes too long."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
