"""Set the environment of a kit's Flower processes, and explain their exit codes.

A test compares the codes and the texts with the pinned Flower, to which they belong.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.consortium.kit import CoordinatorKit, Kit
from deploy.consortium.program import Ending, Remedy
from deploy.simulation.loopback import without_proxy

SUPERNODE_CONNECTION = 305
NODE_ID_TEXT = "SuperNode ID:"
TASK_POLL_SECONDS = "0.2"

_HOPELESS = {
    101: "Flower asks for a licence",
    104: "its arguments are refused; fedbags and Flower do not fit together",
    105: "state/flower.db is of another Flower version: move it away (sites stay registered by nodes/)",
    302: "node.key is not a key of the kind that Flower takes (`fedbags site keygen` makes one)",
    303: "node keys need TLS",
    400: "the configuration of SuperExec is refused",
    401: "superexec.secret cannot be read",
    402: "the configuration of SuperExec is refused",
    600: "an address in the kit cannot be read",
    603: "ca.crt cannot be used",
    604: "a file of the kit is missing",
    605: "the server's certificate cannot be used",
    606: "the other side runs another version of Flower: install the same one on both machines",
}


def environment(kit: Kit) -> Mapping[str, str]:
    """Return the environment variables of every process of a kit.

    With them nothing is installed, no process sends telemetry or asks for updates, and all of Flower's state
    is in the kit.
    """
    beside = str(Path(sys.executable).parent)
    own = (kit.server.admin_address,) if isinstance(kit, CoordinatorKit) else ()
    return {
        **without_proxy(os.environ, *own),
        # Flower starts its other programs by name: those of this installation must be found first.
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(kit.flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL_SECONDS,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def explain(ending: Ending) -> Remedy | None:
    """Return the meaning of a Flower process's exit code where a restart does not help."""
    if ending.code in _HOPELESS:
        return Remedy(f"{_HOPELESS[ending.code]} (Flower's exit code {ending.code})", hopeless=True)
    return None
