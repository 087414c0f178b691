"""The ``fedbags`` command and ``python -m fedbags``: its own packages, whatever else has their names.

A module of the user's own called ``deploy`` or ``common`` that stands before ours on the path is passed by,
and Ctrl-C is met from here on. Only what starts at once is imported.
"""

import signal
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def main() -> None:
    """Run the command line; exit 0 done, 1 the run failed, 2 the user's mistake, 130 Ctrl-C."""
    spec = PathFinder.find_spec("deploy", [str(Path(__file__).parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["deploy"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from deploy import interrupt

    try:
        with interrupt.told():
            from deploy.cli import main as command

            command()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, and what is left takes a moment


if __name__ == "__main__":
    main()
