"""Find, start and end Flower's programs, and keep their connections on this machine.

Shared by a consortium's commands and by the simulation on Flower's own engine. Knows nothing of kits or runs,
and loads nothing of Flower.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from common.errors import UserError

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_NO_PROXY = ("no_proxy", "NO_PROXY")
"""Libraries read one or the other: gRPC only the first, others the second if the first is not set."""

SUPERNODE_CONNECTION = 305
"""Flower's exit code of a SuperNode that the SuperLink does not let in, for whatever reason."""

MISTAKES = {
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
"""Flower's exit codes for what starting again does not mend, with their meaning in a kit."""

_EXIT_CODE = re.compile(r"Exit Code: (\d+)")
_KILL_PATIENCE = 5.0
_TAIL_BYTES = 2**16


def program(name: str) -> str:
    """Return the path of a program of this environment, whether or not the environment is activated.

    Raises:
        UserError: it is not installed.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise UserError(f"the program {name} is not installed beside {sys.executable}: install fedbags there")
    return found


def environment(home: Path, *hosts: str) -> dict[str, str]:
    """Return what to set in the environment of Flower's processes.

    With it nothing is installed, no process sends telemetry or asks for updates, and all of Flower's own
    state is in one folder.

    Args:
        home: FLWR_HOME, Flower's folder.
        hosts: names or IP addresses that are this machine's own, besides the loopback.
    """
    return {
        **without_proxy(os.environ, *hosts),
        # Flower starts its other programs by name: those of this installation must be found first.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def without_proxy(environment: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """Return ``no_proxy`` with the loopback addresses, and further hosts, added to what it has.

    A hospital's shell has ``http_proxy`` or ``ALL_PROXY``, often without ``no_proxy``. httpx, gRPC and Flower
    read these variables, and would ask the proxy for 127.0.0.1.

    Args:
        environment: of this process.
        hosts: names or IP addresses, without a port, that are this machine's own.
    """
    found = [part.strip() for name in _NO_PROXY for part in environment.get(name, "").split(",")]
    listed = ",".join(dict.fromkeys(part for part in (*found, *_LOOPBACK_HOSTS, *hosts) if part))
    return dict.fromkeys(_NO_PROXY, listed)


def exit_code(log: str) -> int | None:
    """Return the last exit code that a program of Flower has printed, or None.

    It tells more than the status of the process, which is 1 for most of them.
    """
    codes = _EXIT_CODE.findall(log)
    return int(codes[-1]) if codes else None


def with_variable(name: str, prefix: str) -> list[int]:
    """Return the ids of the processes that inherited a variable whose value begins with ``prefix``.

    Flower detaches its helpers and Ray its workers, and what they inherited outlives the process that started
    them. Only Linux tells; elsewhere none are found.
    """
    entry = f"{name}={prefix}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        # A process that cannot be read has ended, or is another user's.
        with contextlib.suppress(OSError):
            if any(one.startswith(entry) for one in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


def end(processes: Callable[[], list[int]], patience: float) -> list[int]:
    """Ask processes to end, make them end after ``patience`` seconds, and return those that would not."""
    for sign, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, _KILL_PATIENCE)):
        until = time.monotonic() + seconds
        # Listed anew for each signal, as a process that ends may have started others.
        for pid in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        while (left := processes()) and time.monotonic() < until:
            time.sleep(0.1)
        if not left:
            break
    return left


def tail(path: Path, lines: int = 30, start: int = 0) -> str:
    """Return the last lines of a log, of what stands behind byte ``start``."""
    with path.open("rb") as stream:
        stream.seek(max(start, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return "\n".join(stream.read().decode("utf-8", errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """Return a port of the loopback on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
