"""Several cells at once, each in a process of its own, until all have ended or somebody stops them.

Knows cells by their run folders only.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from deploy.compare.cell import LOG

INTERVAL = 0.5
GRACE = 10.0
"""Seconds that a cell gets to end when the comparison is stopped."""
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def run_all(
    folders: Sequence[Path],
    jobs: int,
    look: Callable[[Sequence[Path]], None],
    ended: Callable[[Path, int], None],
) -> None:
    """Run the cell of every folder, in this order, ``jobs`` at a time.

    Args:
        folders: run folders with an order; the log of a cell is appended to LOG there.
        jobs: processes at once.
        look: called twice a second with the folders at work.
        ended: called with a folder and its process's exit status (negative: the signal that ended it).

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the cells have ended by then.
    """
    waiting, running = deque(folders), dict[Path, subprocess.Popen[bytes]]()
    with _sigterm_is_ctrl_c():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.popleft()
                    running[folder] = _start(folder)
                look(list(running))
                time.sleep(INTERVAL)
                for folder, process in list(running.items()):
                    if (status := process.poll()) is not None:
                        del running[folder]
                        _close(process)
                        ended(folder, status)
        finally:
            _end(list(running.values()))


def _start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.compare.cell", str(folder)],
            stdin=subprocess.PIPE,  # ends with this process: see cell.end_with_parent
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | THREADS,
            # Ctrl-C at the terminal is for us alone; we end the cells.
            start_new_session=True,
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Checkpoints are written whole or not at all, so a cell can be ended at any time."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _close(process)


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
