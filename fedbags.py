"""Run the command line from fedbags's own packages, as ``fedbags`` or ``python -m fedbags``.

A module of the user's own called ``deploy`` or ``common`` that stands before ours on the path is passed by,
and Ctrl-C is handled from here on. Only what starts at once is imported.
"""

import signal
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def main() -> None:
    """Run the command line.

    The exit status is 0 when done, 1 when the run failed, 2 for a mistake of the user, and 130 for Ctrl-C.
    """
    # A plain import would take a module of the same name that stands earlier on the user's path.
    spec = PathFinder.find_spec("deploy", [str(Path(__file__).parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["deploy"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from deploy.simulation import interrupt

    try:
        with interrupt.told():
            from deploy.cli.main import main as command

            command()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, and what is left takes a moment


if __name__ == "__main__":
    main()
