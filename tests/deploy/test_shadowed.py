"""A user's own ``common.py`` or ``client.py`` in the working directory or on PYTHONPATH is not in our way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import shortened

ROOT = Path(__file__).parents[2]
NAMES = ("common", "client", "server", "deploy")


@pytest.fixture(params=NAMES)
def shadowed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a module of the user's own that has one of our names."""
    (tmp_path / f"{request.param}.py").write_text("raise SystemExit('the user\\'s own module was run')")
    return tmp_path


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python as installed: our packages come after what is in the user's way."""
    before = [] if path is None else [str(path)]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*before, str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


COMMANDS = [["--help"], ["config", "--json"], ["simulate", "--set", "x=1"]]


@pytest.mark.parametrize("command", shortened(COMMANDS, COMMANDS[1:2]))
def test_the_command_works_with_a_module_on_pythonpath(shadowed: Path, command: list[str]) -> None:
    result = python("-P", "-c", "from fedbags import main; main()", *command, cwd=shadowed, path=shadowed)
    assert result.returncode == (2 if "simulate" in command else 0), result.stderr
    assert "own module" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_python_m_fedbags_works_in_the_folder_of_the_module(shadowed: Path) -> None:
    result = python("-m", "fedbags", "--help", cwd=shadowed)
    assert result.returncode == 0, result.stderr
    assert "Start here" in result.stdout


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_module_of_the_command_line_works_there_too(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('own module')")
    for arguments in (["-m", "deploy.cli.main"], ["-c", "from deploy.cli.main import main; main()"]):
        result = python(*arguments, "--help", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "Start here" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "flower"])
def test_a_run_works_there_with_worker_processes(sites_dir: Path, tmp_path: Path, engine: str) -> None:
    for name in NAMES[:3]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('own module')")
    result = python(
        "-P", "-m", "fedbags", "simulate", "--sites-dir", str(sites_dir), "--rounds", "1", "--out", "run",
        "--engine", engine, "--workers", "1", "--no-figures", "--set", "model.image-size=16",
        "--set", "model.atoms-per-class=2", cwd=tmp_path, path=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if engine == "local":
        assert "aggregate_train" not in result.stdout + result.stderr, "Flower's log is between our bars"
