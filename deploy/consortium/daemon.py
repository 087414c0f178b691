"""Start a supervisor in the background, describe its programs, and end it.

Works on the files that the supervisor keeps in a kit's ``state`` and ``logs``; knows nothing of its programs.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError
from deploy.consortium.child import LOG_BYTES, Status
from deploy.consortium.processes import end, lookup, require_proc
from deploy.consortium.supervisor import SupervisorState, lock, read_state

LOG_FILE = "supervisor.log"
POLL, END_DEADLINE = 0.2, 40.0
COMMAND = (sys.executable, "-P", "-c", "from deploy.cli.main import main; main()")
"""The fedbags command of this installation, whatever the PATH and the working directory."""


def start(arguments: Sequence[str], state: Path, logs: Path, wait: float) -> bool:
    """Run ``fedbags ARGUMENTS`` (a foreground supervisor) detached from this terminal.

    Args:
        arguments: of the command line.
        state: the folder of that supervisor's state.
        logs: the folder of its logs.
        wait: seconds to wait until everything is ready.

    Returns:
        Whether everything is ready.

    Raises:
        UserError: a supervisor runs already.
        RunError: the supervisor ended; carries what it logged.
    """
    require_proc()
    for folder in (state, logs):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_running(state)
    path = logs / LOG_FILE
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name(f"{LOG_FILE}.1"))
    # The log holds earlier starts too, and an error quotes only what this one wrote.
    offset = path.stat().st_size if path.exists() else 0
    with path.open("ab") as stream:
        process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=state, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
    until = time.monotonic() + wait
    while True:
        found = read_state(state)
        # The state file may still be that of an earlier supervisor, hence the comparison of process ids.
        if found is not None and found.pid == process.pid and is_ready(found):
            return True
        if process.poll() is not None:
            said = path.read_bytes()[offset:].decode("utf-8", errors="replace").strip()
            raise RunError(f"it ended at once; {path} says:\n{said}")
        if time.monotonic() > until:
            return False
        time.sleep(POLL)


def refuse_running(state: Path) -> None:
    """Raise a UserError if a supervisor runs in this state folder."""
    if is_running(state):
        raise UserError(
            f"it runs already (see {state}). `status` shows how it is, `down` ends it; the programs in it "
            "are restarted without your help."
        )


def is_running(state: Path) -> bool:
    """Return whether a supervisor holds the lock of this folder."""
    if not state.is_dir():
        return False
    # The lock and not the file: the kernel frees it when a supervisor is killed, and the file stays.
    with lock(state) as free:
        return not free


def is_ready(found: SupervisorState) -> bool:
    """Return whether every program is ready."""
    return all(program.status is Status.READY for program in found.programs)


def stop(state: Path) -> int:
    """End the supervisor of this folder and everything that it, or one before it, started.

    Returns:
        How many processes were ended; 0 when nothing ran.

    Raises:
        RunError: some would not end.
    """
    require_proc()
    found = read_state(state)
    if found is None:
        return 0
    running = len(found.living())
    supervisor = lookup(found.pid)
    # A process id is used again in time; with the start time it names this supervisor and no later process.
    if supervisor is not None and supervisor.started == found.started and is_running(state):
        running += 1

        def own() -> list[int]:
            now = lookup(supervisor.pid)
            return [] if now is None or now.started != supervisor.started else [now.pid]

        end(own, END_DEADLINE)
    if left := end(found.living, END_DEADLINE):
        raise RunError(f"these processes would not end: {', '.join(map(str, left))}")
    return running


def describe(state: Path, logs: Path) -> dict[str, Any]:
    """Return the state of a kit's programs.

    Returns:
        ``{running, ready, left_behind, programs: [{name, status, pid, since, restarts, reason, log}]}``;
            times are ISO 8601 in UTC, ``left_behind`` counts processes of a supervisor that was killed.
    """
    found = read_state(state) if state.is_dir() else None
    running = is_running(state)
    programs = [
        {
            "name": program.name,
            "status": program.status.value if running else Status.STOPPED.value,
            "pid": program.pid if running else None,
            "since": datetime.fromtimestamp(program.since, UTC).isoformat(timespec="seconds"),
            "restarts": program.restarts,
            "reason": program.reason,
            "log": str(logs / f"{program.name}.log"),
        }
        for program in (found.programs if found else [])
    ]
    return {
        "running": running,
        "ready": running and found is not None and is_ready(found),
        "left_behind": len(found.living()) if found and not running else 0,
        "programs": programs,
    }
