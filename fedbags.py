"""Offer fedbags to Python programs, and run its command line as ``fedbags`` or ``python -m fedbags``.

``docs/python.md`` lists the names; each is loaded when it is first used, so that importing this module and
asking for ``--help`` take no time. A module of the user's own called ``deploy`` or ``common`` that stands
before ours on the path is passed by, and Ctrl-C on the command line is handled from the first lines on.
"""

import os
import signal
import sys

_STOPPED = b"stopped before it was done: give the same command again\n"


def _stop(_signal: int, _frame: object) -> None:
    """End the process at once, since nothing is begun before the command line takes over."""
    os.write(2, _STOPPED)
    os._exit(130)


def _stop_on_interrupt() -> None:
    # A shell starts background jobs with SIGINT ignored: then it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


# Before the imports below, which Ctrl-C would break into with a traceback. A program that imports this module
# keeps its own Ctrl-C.
if __name__ == "__main__" or sys.argv[0].rpartition(os.sep)[2] == "fedbags":
    _stop_on_interrupt()

from contextlib import ExitStack  # noqa: E402
from importlib import import_module  # noqa: E402
from importlib.machinery import PathFinder  # noqa: E402
from importlib.util import module_from_spec  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from common.config import RunConfig
    from common.errors import DataError, FedbagsError, RunError, UserError
    from common.hierarchy import Hierarchy
    from common.parts import Kind, Part, register_part
    from deploy.api import (
        Run,
        build_site,
        build_sites,
        check_site,
        compare,
        load_run,
        predict,
        report,
        simulate,
    )
    from deploy.datasets.options import Division, SourceOptions, SyntheticHospitals

__all__ = [
    "DataError",
    "Division",
    "FedbagsError",
    "Hierarchy",
    "Kind",
    "Part",
    "Run",
    "RunConfig",
    "RunError",
    "SourceOptions",
    "SyntheticHospitals",
    "UserError",
    "build_site",
    "build_sites",
    "check_site",
    "compare",
    "load_run",
    "predict",
    "register_part",
    "report",
    "simulate",
]
_ELSEWHERE = {
    "Hierarchy": "common.hierarchy",
    "RunConfig": "common.config",
    **dict.fromkeys(("Kind", "Part", "register_part"), "common.parts"),
    **dict.fromkeys(("Division", "SourceOptions", "SyntheticHospitals"), "deploy.datasets.options"),
    **dict.fromkeys(("DataError", "FedbagsError", "RunError", "UserError"), "common.errors"),
}
_HOMES = {name: _ELSEWHERE.get(name, "deploy.api") for name in __all__}


def main() -> None:
    """Run the command line.

    The exit status is 0 when done, 1 when the run failed, 2 for a mistake of the user, and 130 for Ctrl-C.
    """
    _stop_on_interrupt()
    _take_own_packages()
    from deploy.simulation import interrupt

    try:
        with ExitStack() as stack:
            # Between the two handlers a Ctrl-C waits, instead of finding none.
            with interrupt.held_off():
                if signal.getsignal(signal.SIGINT) is _stop:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                stack.enter_context(interrupt.handled())
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
