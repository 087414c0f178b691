"""Keep the composed privacy loss of a ledger, so that a new process composes only newer events.

The file is a copy of what can be computed from the ledger. It is dropped, and everything is composed again,
unless

- this site wrote it: an HMAC under the site's secret covers all of it. Whoever can write the file, and can
  neither read nor replace the secret, cannot make the site understate what it spent. Whoever owns the site
  folder can, as they can rewrite the ledger; `fedbags ledger verify` composes from the events alone;
- the same version of the accountant wrote it;
- the ledger's chain holds the very row after which it was written, so another ledger's file, or one newer
  than a ledger that was rolled back, is not used.

In addition, what it composes must be among the ledger's events (``common.privacy.composition``), so that
an older file of the same ledger costs time only.
"""

import hmac
import os
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client import site_secret
from client.ledger_book import Book
from common.errors import UserError
from common.privacy import composition
from common.privacy.composition import Composition, amounts_of
from common.privacy.events import Adjacency, Unit

CARRY_SUFFIX = ".composed"
"""Takes the place of the ledger's own, beside it."""
PURPOSE = "composed-privacy-loss"
FORMAT = 1
"""Raise it when grids or bounds are chosen in another way."""
SEAL_BYTES = 32


class CarryFile:
    """Read and write the composed privacy loss of one ledger.

    Nothing is written before a ledger has more than ``composition.DIRECT`` events.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_suffix(CARRY_SUFFIX)
        self._written: tuple[Composition, ...] = ()

    def recall(self, book: Book, hash_of: Callable[[int], str | None]) -> None:
        """Load the file into memory if it can be trusted and memory has nothing of this ledger yet.

        Args:
            book: the ledger.
            hash_of: the hash of a row of its file, None where there is no such row.
        """
        if not _is_long(book) or _kept_of(book):
            return
        try:
            content = self.path.read_bytes()
            seal, content = content[:SEAL_BYTES], content[SEAL_BYTES:]
            # The seal is checked before anything is parsed: nothing of a foreign file reaches the
            # unpacking code.
            if not hmac.compare_digest(seal, self._seal(content)):
                return
            about, compositions = composition.unpack(content)
        except (OSError, UserError, ValueError, KeyError, zipfile.BadZipFile):
            return  # there is none, or none that this site's code writes: everything is composed again
        # The head is read from this ledger: the file of another ledger, or of rows that were rolled back,
        # does not match.
        if about != _about(book, about["rows"], hash_of(about["rows"])):
            return
        for carried in compositions:
            composition.keep(carried)
        self._written = compositions

    def keep(self, book: Book) -> None:
        """Write what memory holds of this ledger's composition, if that is more than the file holds."""
        if not _is_long(book):
            return
        kept = _kept_of(book)
        if not kept or set(kept) <= set(self._written):
            return
        content = composition.pack(kept, _about(book, book.rows, book.head))
        # The ledger holds what counts: where this file cannot be written, the next process takes longer.
        with suppress(OSError, UserError):
            self._write(self._seal(content) + content)
            self._written = kept

    def _seal(self, content: bytes) -> bytes:
        return site_secret.derive(self.path.parent, PURPOSE, content)

    def _write(self, content: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            Path(name).replace(self.path)
        finally:
            Path(name).unlink(missing_ok=True)


def _is_long(book: Book) -> bool:
    return len(book.events_for(book.unit)) > composition.DIRECT


def _kept_of(book: Book) -> tuple[Composition, ...]:
    """Return the compositions in memory of the ledger's events, scaled to its unit and to a bag."""
    kept: dict[Composition, None] = {}
    for unit in dict.fromkeys((book.unit, Unit.BAG)):
        kept |= dict.fromkeys(composition.kept_for(amounts_of(book.events_for(unit)), Adjacency.REPLACE_ONE))
    return tuple(kept)


def _about(book: Book, rows: int, head: str | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "accountant": version("dp-accounting"),
        "site": book.site,
        "rows": rows,
        "head": head,
    }
