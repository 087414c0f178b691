"""Run several cells at once, each in its own process, until all have ended or the user stops them.

The module knows cells only by their run folders.
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
# A cell computes on one thread, so that `jobs` cells share the cores and their times can be compared.
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
                # Before the pause: a cell that starts and ends within it would otherwise never be shown.
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
            # The pipe closes when this process is gone, which ends the cell: see cell.end_with_parent.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | THREADS,
            # In a session of its own a cell gets no Ctrl-C from the terminal, and this process ends it.
            start_new_session=True,
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all processes, by SIGTERM first and after the grace period by SIGKILL.

    A cell can be ended at any time, because a checkpoint is written completely or not at all.
    """
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
