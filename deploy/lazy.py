"""Import modules at the top of a file and run them when they are first used.

``fedbags --help`` loads every command but none of the libraries that the commands need: torch alone takes
seconds. A fault in the options is named before they load, too.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any


class _LazyModule(ModuleType):
    """Stand in sys.modules for a module that has not run yet."""

    def __getattr__(self, name: str) -> Any:
        # torch and inspect ask every loaded module for such names, which must not run all of them.
        if name.startswith("__"):
            raise AttributeError(name)
        loader = self.__loader__
        assert isinstance(loader, _LazyLoader)
        self.__class__ = ModuleType  # type: ignore[assignment]
        try:
            loader.run(self)
        except BaseException:
            self.__class__ = _LazyModule
            raise
        return getattr(self, name)


class _LazyLoader(SourceFileLoader):
    """Load a module without running it."""

    def exec_module(self, module: ModuleType) -> None:
        # A package has to run: only then does Python know where its modules are.
        if self.is_package(self.name):
            self.run(module)
        else:
            module.__class__ = _LazyModule

    def run(self, module: ModuleType) -> None:
        # What a module imports itself is its own affair.
        with _laziness(False):
            super().exec_module(module)


class _LazyFinder:
    """Find modules that are to run on their first use."""

    active = False

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if cls.active else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LazyLoader(spec.loader.name, spec.loader.path)
        return spec


@contextmanager
def _laziness(active: bool) -> Iterator[None]:
    before, _LazyFinder.active = _LazyFinder.active, active
    try:
        yield
    finally:
        _LazyFinder.active = before


@contextmanager
def lazy_imports() -> Iterator[None]:
    """Let the modules that are imported inside the ``with`` statement run on their first use.

    Import whole modules (``from package import module``): asking a module for a name runs it. A module that
    does not exist is found at once. Annotations that name such a module are written as texts.

    The standard library's LazyLoader also runs a module that is asked for ``__file__`` or ``__spec__``, which
    torch asks of every loaded module while it is itself half loaded.
    """
    if _LazyFinder not in sys.meta_path:
        sys.meta_path.insert(0, _LazyFinder)
    with _laziness(True):
        yield
