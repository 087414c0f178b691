"""Load the packages of fedbags from their own folder, whatever other modules have their names.

``common``, ``client`` and ``server`` are names that users give to modules of their own. Such a module in the
working directory or on PYTHONPATH would come first, so ours are taken by their place.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

OWN = ("common", "client", "server", "deploy")
PACKAGES = Path(__file__).parents[1]
"""Our packages, and the folder that they are in."""


def _take(name: str) -> None:
    spec = PathFinder.find_spec(name, [str(PACKAGES)])
    if name in sys.modules or spec is None or spec.loader is None:
        return
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


# The last is this package, which is being imported already.
for _name in OWN[:-1]:
    _take(_name)
