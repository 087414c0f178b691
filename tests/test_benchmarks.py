"""The scripts of benchmarks/ fit the code; nothing else loads them before somebody needs a figure."""

import importlib
import io
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
# The apps are loaded by Flower, and read their settings on import.
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.endswith("_apps"))


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_measures(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert script in capsys.readouterr().out


def test_the_app_with_a_clock_holds_all_that_the_app_holds(tmp_path: Path) -> None:
    module = importlib.import_module("deployed_round")
    with zipfile.ZipFile(io.BytesIO(module.build_bundle())) as bundle:
        app = set(bundle.namelist())
    with zipfile.ZipFile(io.BytesIO(module.clocked_app(tmp_path))) as bundle:
        assert set(bundle.namelist()) == app | {"deployed_apps.py"}
