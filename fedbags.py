"""Offer fedbags to Python programs, and run its command line as ``fedbags`` or ``python -m fedbags``.

``docs/python.md`` lists the names; each is loaded when it is first used, so that importing this module and
asking for ``--help`` take no time. A module of the user's own called ``deploy`` or ``common`` that stands
before ours on the path is passed by, and Ctrl-C on the command line is handled from here on.
"""

import signal
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.config import RunConfig
    from common.errors import DataError, FedbagsError, RunError, UserError
    from common.hierarchy import Hierarchy
    from deploy.api import (
        Run,
        build_site,
        check_site,
        compare,
        load_run,
        predict,
        report,
        simulate,
    )

__all__ = [
    "DataError",
    "FedbagsError",
    "Hierarchy",
    "Run",
    "RunConfig",
    "RunError",
    "UserError",
    "build_site",
    "check_site",
    "compare",
    "load_run",
    "predict",
    "report",
    "simulate",
]
_ELSEWHERE = {
    "Hierarchy": "common.hierarchy",
    "RunConfig": "common.config",
    **dict.fromkeys(("DataError", "FedbagsError", "RunError", "UserError"), "common.errors"),
}
_HOMES = {name: _ELSEWHERE.get(name, "deploy.api") for name in __all__}


def main() -> None:
    """Run the command line.

    The exit status is 0 when done, 1 when the run failed, 2 for a mistake of the user, and 130 for Ctrl-C.
    """
    _take_own_packages()
    from deploy.simulation import interrupt

    try:
        with interrupt.told():
            from deploy.cli.main import main as command

            command()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, and what is left takes a moment


def _take_own_packages() -> None:
    """Import ``deploy`` from beside this file, and with it the packages that it works with."""
    if "deploy" in sys.modules:
        return
    # A plain import would take a module of the same name that stands earlier on the user's path.
    spec = PathFinder.find_spec("deploy", [str(Path(__file__).parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["deploy"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedbags' has no attribute {name!r}")
    _take_own_packages()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if __name__ == "__main__":
    main()
