"""Lock a folder, so that one process at a time works in it.

The kernel holds the lock, so a killed process leaves it to the next one and nothing stale has to be removed.
The file only names its holder.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError

_LOCK = ".lock"


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
    path = folder / _LOCK
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path, timeout=patience, poll_interval=0.1))
            # Removed while it is locked: a process that opened it meanwhile finds that it is gone.
            stack.callback(path.unlink, missing_ok=True)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        except Timeout:
            holder = path.read_text(encoding="utf-8").strip() if path.exists() else ""
            raise UserError(
                f"{what} is at work in {folder}: {holder or 'another process'}\n"
                "Wait for it, end it, or choose another folder with --out."
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written: {error.strerror or error}\n"
                "Choose a folder that you may write to, with space left, with --out."
            ) from error
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove nested folders, the innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
