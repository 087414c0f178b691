"""Record in a small file what a site has done once, and refuse it the second time.

Flower runs every message in a process of its own, two at once if a server sends two, and each gets the
node's state as it was before. So a rule such as "one mask, one vector" is kept here, where the first
process wins: a row of SQLite whose key is unique. Knows nothing of what is claimed.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.errors import RunError, SecureAggregationRefused

WAIT_SECONDS = 30.0


def claim(path: Path, key: str, content: str | None = None) -> None:
    """Claim ``key`` for good, or refuse if it was claimed before.

    With ``content``, the same claim may be repeated, and no other made.

    Raises:
        SecureAggregationRefused: it was claimed before (with something else).
        RunError: the file cannot be written; nothing may be done then.
    """
    with _open(path) as db:
        # One statement decides: to look first and write then would let two processes both find the key
        # free.
        made = db.execute("INSERT OR IGNORE INTO claims VALUES (?, ?)", (key, content)).rowcount
        kept = db.execute("SELECT content FROM claims WHERE key = ?", (key,)).fetchone()
    if not made and (content is None or kept != (content,)):
        raise SecureAggregationRefused("asked a second time for what is done once")


def claimed(path: Path, key: str) -> str | None:
    """Return the content under which ``key`` was claimed, or None if it was not.

    Raises:
        RunError: the file cannot be read.
    """
    with _open(path) as db:
        kept = db.execute("SELECT content FROM claims WHERE key = ?", (key,)).fetchone()
    return kept[0] if kept else None


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as db, db:
            # A claim that a power cut undoes could be made again, and a second answer under the same
            # masks gives the first away.
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, content TEXT)")
            yield db
    except sqlite3.Error as error:
        raise RunError("the site's file of claims cannot be written; is its disk full?") from error
