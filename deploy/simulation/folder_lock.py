"""Lock a folder, so that one process at a time works in it.

The kernel holds the lock (flock), so a killed process leaves it to the next one and nothing stale has to be
removed. The file only names its holder.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from common.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder while the body of a ``with`` statement runs.

    The folder is made if missing. If it stays empty, it is removed again, with those of its parents that were
    made.

    Args:
        folder: to hold.
        what: what is done in it, for the message to the second one: ``a run``.
        patience: seconds to wait for another process to let go.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    path = folder / LOCK
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = _hold(path, what, time.monotonic() + patience)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}\n"
            "Choose a folder that you may write to, with space left, with --out."
        ) from error
    with stream:
        try:
            yield
        finally:
            # Removed while it is locked. A process that opened it meanwhile finds in _hold that it is gone.
            path.unlink(missing_ok=True)
            # A folder with something in it cannot be removed, and stays.
            with suppress(OSError):
                for place in made:
                    place.rmdir()


def _hold(path: Path, what: str, until: float) -> TextIO:
    while True:
        # Opened without truncating it: the file still names the process that holds the lock.
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip()
            stream.close()
            if time.monotonic() > until:
                raise UserError(
                    f"{what} is at work in {path.parent}: {holder or 'another process'}\n"
                    "Wait for it, end it, or choose another folder with --out."
                ) from None
            time.sleep(0.1)
            continue
        except BaseException:
            stream.close()
            raise
        # Whoever held it before may have removed the file between our opening and locking it.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            stream.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
            stream.flush()
            return stream
        stream.close()
