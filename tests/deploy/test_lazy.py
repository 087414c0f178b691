"""Modules imported lazily run on their first use, and not before."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lazy import lazy_imports


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "lazily_imported"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "module.py").write_text("import builtins\nbuiltins.ran += 1\nVALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.ran", 0, raising=False)
    yield folder
    for name in [name for name in sys.modules if name.startswith("lazily_imported")]:
        del sys.modules[name]


def runs() -> int:
    import builtins

    count: int = builtins.ran  # type: ignore[attr-defined]
    return count


def test_a_module_runs_once_when_it_is_first_used(package: Path) -> None:
    with lazy_imports():
        from lazily_imported import module  # type: ignore[import-not-found]
    assert runs() == 0
    assert module.VALUE == 7
    assert (module.VALUE, runs()) == (7, 1)
    assert inspect.getsource(module).endswith("VALUE = 7\n")


def test_what_libraries_ask_of_every_module_does_not_run_it(package: Path) -> None:
    with lazy_imports():
        from lazily_imported import module
    assert module.__file__ == str(package / "module.py")
    assert not hasattr(module, "__warningregistry__")
    inspect.getmodule(inspect.currentframe())
    assert runs() == 0


def test_an_ordinary_import_of_a_name_runs_it(package: Path) -> None:
    with lazy_imports():
        pass
    from lazily_imported.module import VALUE

    assert (VALUE, runs()) == (7, 1)


def test_a_module_that_does_not_exist_is_found_at_once(package: Path) -> None:
    with pytest.raises(ImportError), lazy_imports():
        from lazily_imported import missing  # noqa: F401


def test_what_a_package_or_a_lazy_module_imports_is_not_lazy(package: Path) -> None:
    inner = package / "inner"
    inner.mkdir()
    (inner / "__init__.py").write_text("from lazily_imported import module\n")
    (package / "outer.py").write_text("from lazily_imported.inner import module, other\n")
    (inner / "other.py").write_text("import builtins\nbuiltins.ran += 10\n")
    with lazy_imports():
        from lazily_imported import outer

        assert runs() == 0
        assert outer.module.VALUE == 7
    assert runs() == 11


def test_a_module_that_failed_is_run_again(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "faulty.py").write_text("import builtins\nVALUE = 1 / builtins.ran\n")
    with lazy_imports():
        from lazily_imported import faulty
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            _ = faulty.VALUE
    monkeypatch.setattr("builtins.ran", 2)
    assert faulty.VALUE == 0.5
