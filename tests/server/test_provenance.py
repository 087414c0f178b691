"""The commit is that of the code that runs, or none."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from server.run_folder import _ROOT, _git_commit, code_version


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_commit_of_this_checkout_only_and_changes_are_marked(tmp_path: Path) -> None:
    assert _git_commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    commit = _git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    git(tmp_path, "tag", "v9")
    assert _git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert _git_commit(tmp_path) == f"{commit}-dirty"
    # What is installed below somebody else's checkout has no commit of its own.
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert _git_commit(inside) is None


def test_without_git_there_is_a_version_and_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (_ROOT / "server" / "run_folder.py").is_file()
    assert code_version()["version"] == version("fedbags")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == {"version": version("fedbags"), "commit": None}
