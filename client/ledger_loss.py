"""Accepting that a ledger, or its newest rows, are lost: what is known of them is charged on, and recorded.

The site's owner alone can say so, by hand (``fedbags ledger accept-loss``); nothing that a server sends does.
"""

from collections.abc import Sequence
from pathlib import Path

from client.ledger import Ledger, new_identifier, now
from client.ledger_anchor import AnchorFile, LedgerLostError, lost_events, lost_marks
from client.ledger_file import Kind, LedgerError, Mark, create, hash_of
from common.privacy.events import PoissonGaussian, Unit

LEAST_CAP = 1e-9
NO_NOISE = PoissonGaussian(sample_rate=1.0, noise_multiplier=0.0, steps=1)
"""Stands for spending that nobody knows: no epsilon bounds it."""


def accept_loss(
    path: Path, site: str, data_version: str, anchor: AnchorFile, seen: Sequence[Mark] = ()
) -> bool:
    """Record that the site's owner takes it that rows of the ledger are lost, and charge what is known.

    What the anchor says was spent is charged on. Where there is no anchor that can be read, an event
    without noise is charged: nobody knows what was spent, so the whole budget counts as spent.

    Args:
        path: the ledger; a missing one is made anew.
        site: the site's name.
        data_version: of the site's data as it is now; taken as accepted in a new ledger.
        anchor: where the second anchor lies.
        seen: other witnesses of the chain, such as the site's journal.

    Returns:
        False when nothing is lost; nothing is written then.

    Raises:
        LedgerError: the ledger there is damaged, or another site's, or the anchor is.
        LedgerBusyError: the file cannot be written.
    """
    ledger = Ledger(path, data_version, anchor, seen)
    unreadable, anchored = False, None
    try:
        anchored = anchor.read()
    except LedgerLostError:
        unreadable = True
    if anchored is not None and anchored.site != site:
        raise LedgerError(f"the anchor {anchor.path} is of site {anchored.site!r}, not of {site!r}")
    if not path.exists():
        if anchored is None and not unreadable and not seen:
            return False
        opening = {
            "site": site,
            "unit": anchored.unit if anchored else Unit.BAG.value,
            "data_version": data_version,
            # Where no cap is known, the smallest: opening with the site's own records that one.
            "cap_epsilon": anchored.cap_epsilon if anchored else LEAST_CAP,
            "cap_delta": anchored.cap_delta if anchored else LEAST_CAP,
        }
        create(path, {**opening, "identifier": new_identifier(), "time": now()})
    with ledger.transaction(checked=False) as db:
        book = ledger.book
        if book.site != site:
            raise LedgerError(f"the ledger {path} is of site {book.site!r}, not of {site!r}")
        marks = [*([anchored.mark] if anchored else []), *seen]
        lost = lost_marks(marks, book, lambda seq: hash_of(db, seq))
        if not lost and not unreadable:
            return False
        if anchored is None:
            events = {"events": [(NO_NOISE.model_dump(), 1)], "bag_events": [(NO_NOISE.model_dump(), 1)]}
        else:
            events = (
                lost_events(anchored, book) if anchored.mark in lost else {"events": [], "bag_events": []}
            )
        body = {**events, "heads": [mark.head for mark in lost], "rows": [mark.rows for mark in lost]}
        ledger.append(db, Kind.LOST, body)
    return True
