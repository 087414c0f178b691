"""Keep two files beside a ledger: a second record of what was spent, and its composed privacy loss.

A ledger that is deleted, or replaced by an older copy, is consistent in itself. The anchor is not in it: it
lies in the kit's state folder if the site has a kit, else in the ledger's folder, and is written after every
row. It may be behind the ledger (a crash between the two), never ahead: a ledger whose chain does not hold
the anchor's head has lost rows. The anchor carries the events, so that a lost file loses no spending.

The composed privacy loss is kept so that a new process composes only newer events. It is a copy of what can
be computed from the ledger. It is dropped, and everything is composed again, unless

- this site wrote it: an HMAC under the site's secret covers all of it. Whoever can write the file, and can
  neither read nor replace the secret, cannot make the site understate what it spent. Whoever owns the site
  folder can, as they can rewrite the ledger; `fedbags ledger verify` composes from the events alone;
- the same version of the accountant wrote it;
- the ledger's chain holds the very row after which it was written, so another ledger's file, or one newer
  than a ledger that was rolled back, is not used.

In addition, what it composes must be among the ledger's events (``common.privacy.accounting``), so that
an older file of the same ledger costs time only.
"""

import hmac
import json
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client import site
from client.ledger.file import LedgerBusyError, LedgerError, Mark
from client.ledger.state import LedgerState, Tally, tally
from common.errors import UserError
from common.files import locked, newest_json_lines, write_bytes, write_text
from common.privacy import accounting
from common.privacy.accounting import Composition, amounts_of
from common.privacy.events import UNIT, Adjacency

_ANCHOR_SUFFIX = ".anchor.json"
"""Takes the place of the ledger's own, in the kit's state folder or beside the ledger."""
_STATE = "state"
"""The kit's folder for what must outlive a restart."""

ADVICE = (
    "Put back the newest intact copy of the ledger. If there is none, accept the loss once, at the site: "
    "`fedbags ledger accept-loss SITE_FOLDER [--kit KIT]`. What the anchor says was spent keeps counting; "
    "where nothing says it, the whole budget counts as spent. Statements and reports show the loss."
)
_CARRY_SUFFIX = ".composed"
"""Suffix of the file that holds the composed privacy loss, in the ledger's folder."""
_PURPOSE = "composed-privacy-loss"
_FORMAT = 1
"""Raise it when grids or bounds are chosen in another way."""
_SEAL_BYTES = 32


class LedgerLostError(LedgerError):
    """Report that the ledger is missing, or no longer holds rows that the site once wrote."""


class Anchor(BaseModel):
    """Represent the ledger as it was after its newest row."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    site: str
    unit: Literal["bag"] = UNIT
    rows: int = Field(ge=1)
    head: str = Field(pattern="^[0-9a-f]{64}$")
    cap_epsilon: float
    cap_delta: float
    events: list[tuple[dict[str, Any], int]]
    """What was spent, equal events together."""

    @classmethod
    def of(cls, state: LedgerState) -> "Anchor":
        """Return the anchor of a ledger state with at least one row."""
        return cls(
            site=state.site,
            rows=state.rows,
            head=state.head,
            cap_epsilon=state.cap.epsilon,
            cap_delta=state.cap.delta,
            events=tally(state.merged),
        )

    @property
    def mark(self) -> Mark:
        """Return the length of the chain and its newest hash."""
        return Mark(self.rows, self.head)


@dataclass(frozen=True)
class AnchorFile:
    """Read and write the anchor of one ledger."""

    path: Path

    def read(self) -> Anchor | None:
        """Return the anchor, or None if there is none.

        Raises:
            LedgerLostError: the file is damaged, so that the ledger's last known state is unknown.
        """
        try:
            return Anchor.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise LedgerLostError(
                f"the ledger's anchor {self.path} cannot be read ({type(error).__name__})\n{ADVICE}"
            ) from error

    def advance(self, state: LedgerState) -> None:
        """Write the ledger's present state to the anchor, unless another process has written more already.

        Raises:
            LedgerBusyError: it cannot be written; what was to happen must not happen.
        """
        try:
            self.path.parent.mkdir(exist_ok=True)  # the kit's state folder, if missing; never the kit
            with locked(self.path.parent):
                try:
                    found = self.read()
                except LedgerLostError:
                    # A damaged anchor may be overwritten only after the owner has accepted a loss.
                    # Otherwise spoiling the anchor would be enough to hide an older ledger.
                    if not state.losses:
                        raise
                    found = None
                # A shorter chain may replace the anchor's only where the anchor's was declared lost:
                # after that, the new chain is the ledger.
                if found is None or found.rows < state.rows or found.head in state.lost:
                    # The folder is not synced: an older anchor is still one of this chain.
                    write_text(self.path, Anchor.of(state).model_dump_json(), 0o600, sync="content")
        except OSError as error:
            raise LedgerBusyError(f"the ledger's anchor {self.path} cannot be written: {error}") from error


def anchor_file(ledger: Path, kit: Path | None = None) -> AnchorFile:
    """Return the anchor of a ledger, in the kit's state folder if there is a kit, else in the ledger's."""
    folder = ledger.parent if kit is None else kit / _STATE
    return AnchorFile(folder / ledger.with_suffix(_ANCHOR_SUFFIX).name)


def newest_mark(path: Path) -> tuple[Mark, ...]:
    """Return the newest mark of the ledger in a journal, if there is one, from the end of the file.

    A line that is torn or edited is passed over: the ledger's anchor has the mark too.
    """
    for line in newest_json_lines(path):
        with suppress(ValueError, TypeError, KeyError):
            mark = Mark(int(line["ledger_rows"]), str(line["ledger_head"]))
            if mark.rows > 0:
                return (mark,)
    return ()


def lost_marks(marks: Iterable[Mark], state: LedgerState, hash_of: Callable[[int], str | None]) -> list[Mark]:
    """Return the marks that the chain does not hold and whose loss nobody accepted.

    Args:
        marks: how long the chain was, and its head then.
        state: the ledger.
        hash_of: the hash of a row of the file, None where there is no such row.
    """
    return [mark for mark in marks if mark.head not in state.lost and hash_of(mark.rows) != mark.head]


def lost_events(anchor: Anchor, state: LedgerState) -> Tally:
    """Return the events that the anchor counts as spent and the ledger does not.

    A ledger whose every event the anchor knows too is an older copy of the same chain, so the difference was
    lost. Any other was written apart from that chain: then all that the anchor knows counts on top.
    """
    left: dict[str, int] = {}
    plain: dict[str, dict[str, Any]] = {}
    for sign, side in ((1, anchor.events), (-1, tally(state.merged))):
        for event, number in side:
            fixed = {name: value for name, value in event.items() if name != "steps"}
            # Steps are compared as a sum: the same spending may be divided into rows in another way.
            key = json.dumps(fixed, sort_keys=True)
            plain[key] = fixed
            left[key] = left.get(key, 0) + sign * number * int(event.get("steps", 1))
    if any(number < 0 for number in left.values()):
        return list(anchor.events)
    return [
        ({**plain[key], "steps": number}, 1)
        if plain[key]["kind"] == "poisson_gaussian"
        else (plain[key], number)
        for key, number in left.items()
        if number
    ]


class CarryFile:
    """Read and write the composed privacy loss of one ledger.

    Nothing is written before a ledger has more than ``accounting.DIRECT`` events.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_suffix(_CARRY_SUFFIX)
        self._written: tuple[Composition, ...] = ()

    def recall(self, state: LedgerState, hash_of: Callable[[int], str | None]) -> None:
        """Load the file into memory if it can be trusted and memory has nothing of this ledger yet.

        Args:
            state: the ledger.
            hash_of: the hash of a row of its file, None where there is no such row.
        """
        if not _is_long(state) or _kept_of(state):
            return
        try:
            content = self.path.read_bytes()
            seal, content = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
            # The seal is checked before anything is parsed: nothing of a foreign file reaches the
            # unpacking code.
            if not hmac.compare_digest(seal, self._seal(content)):
                return
            about, compositions = accounting.unpack(content)
        except (OSError, UserError, ValueError, KeyError, zipfile.BadZipFile):
            return  # there is none, or none that this site's code writes: everything is composed again
        # The head is read from this ledger: the file of another ledger, or of rows that were rolled back,
        # does not match.
        if about != _about(state, about["rows"], hash_of(about["rows"])):
            return
        for carried in compositions:
            accounting.keep(carried)
        self._written = compositions

    def keep(self, state: LedgerState) -> None:
        """Write what memory holds of this ledger's composition, if that is more than the file holds."""
        if not _is_long(state):
            return
        kept = _kept_of(state)
        if not kept or set(kept) <= set(self._written):
            return
        content = accounting.pack(kept, _about(state, state.rows, state.head))
        # The ledger holds what counts: where this file cannot be written, the next process takes longer.
        with suppress(OSError, UserError):
            write_bytes(self.path, self._seal(content) + content, 0o600, sync="nothing")
            self._written = kept

    def _seal(self, content: bytes) -> bytes:
        return site.derive(self.path.parent, _PURPOSE, content)


def _is_long(state: LedgerState) -> bool:
    return len(state.merged) > accounting.DIRECT


def _kept_of(state: LedgerState) -> tuple[Composition, ...]:
    """Return the compositions in memory of the ledger's events."""
    return tuple(accounting.kept_for(amounts_of(state.merged), Adjacency.REPLACE_ONE))


def _about(state: LedgerState, rows: int, head: str | None) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "accountant": version("dp-accounting"),
        "site": state.site,
        "rows": rows,
        "head": head,
    }
