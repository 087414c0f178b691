"""Record an accepted loss of a ledger or of its newest rows, and charge what is known of them.

Only the site's owner can accept a loss, by hand (``fedbags ledger accept-loss``). A server cannot.
"""

from collections.abc import Sequence

from client.ledger.anchor import Anchor, LedgerLostError, lost_events, lost_marks
from client.ledger.file import Kind, LedgerError, Mark, create, hash_of, holds
from client.ledger.ledger import Ledger, Opening, new_identifier, now
from client.ledger.state import LedgerState, Tally
from common.privacy.events import PoissonGaussian, Unit

_LEAST_CAP = 1e-9
_NO_NOISE = PoissonGaussian(sample_rate=1.0, noise_multiplier=0.0, steps=1)
"""Stands for spending that nobody knows: no epsilon bounds it."""


_UNKNOWN_ROWS = 0
"""Stands for the length of a chain of which only the newest hash is known."""


def accept_loss(ledger: Ledger, site: str, head: str | None = None) -> bool:
    """Record that the site's owner accepts the loss of ledger rows, and charge what is known of them.

    Spending that the anchor records and the ledger does not is charged. Where a witness names rows that no
    readable anchor covers, an event without noise is charged too: nobody knows what was spent, so the whole
    budget counts as spent.

    Args:
        ledger: for the site's data as it is now, which is taken as accepted in a new ledger, with its anchor
            and the other witnesses of its chain. A missing one is made anew.
        site: the site's name.
        head: the ledger head that the coordinator holds of this site, 64 hexadecimal digits.

    Returns:
        False when nothing is lost; nothing is written then.

    Raises:
        LedgerError: the ledger there is damaged, or another site's, or the anchor is.
        LedgerBusyError: the file cannot be written.
    """
    path, anchor, seen = ledger.path, ledger.anchor, ledger.seen
    unreadable, anchored = False, None
    try:
        anchored = anchor.read()
    except LedgerLostError:
        # A damaged anchor is a loss like any other: what it recorded is unknown, so the whole budget will
        # count as spent.
        unreadable = True
    if anchored is not None and anchored.site != site:
        raise LedgerError(f"the anchor {anchor.path} is of site {anchored.site!r}, not of {site!r}")
    if not path.exists():
        if anchored is None and not unreadable and not seen and head is None:
            return False
        # Where no cap is known, the smallest: opening with the site's own records that one.
        epsilon, delta = (anchored.cap_epsilon, anchored.cap_delta) if anchored else (_LEAST_CAP, _LEAST_CAP)
        opening = Opening(site, ledger.data_version, epsilon, delta).body()
        opening["unit"] = anchored.unit if anchored else Unit.BAG.value
        create(path, {**opening, "identifier": new_identifier(), "time": now()})
    # Unchecked, because the check would refuse exactly the ledger that is to be mended here.
    with ledger.transaction(checked=False) as db:
        state = ledger.state
        if state.site != site:
            raise LedgerError(f"the ledger {path} is of site {state.site!r}, not of {site!r}")
        marks = [*([anchored.mark] if anchored else []), *seen]
        lost = lost_marks(dict.fromkeys(marks), state, lambda seq: hash_of(db, seq))
        # The coordinator's head finds a loss even if ledger, anchor and journal were all replaced
        # together.
        if (
            head is not None
            and head not in {mark.head for mark in marks} | state.lost
            and not holds(db, head)
        ):
            lost.append(Mark(_UNKNOWN_ROWS, head))
        if not lost and not unreadable:
            return False
        body = {
            **_charged(lost, anchored, state),
            "heads": [mark.head for mark in lost],
            "rows": [mark.rows for mark in lost],
        }
        ledger.append(db, Kind.LOST, body)
    return True


def _charged(lost: Sequence[Mark], anchored: Anchor | None, state: LedgerState) -> dict[str, Tally]:
    """Return the events that a loss costs.

    They are what the anchor counts as spent and the ledger does not, and an event without a bound if a mark
    names rows that the anchor does not cover.
    """
    reaches = anchored.rows if anchored is not None and anchored.mark in lost else _UNKNOWN_ROWS
    known = (
        lost_events(anchored, state) if anchored is not None and reaches else {"events": [], "bag_events": []}
    )
    # A chain as long as the anchor's, or shorter, is taken for the beginning of the anchor's own, unless the
    # ledger holds the anchor's: then it is another.
    if anchored is not None and all(_UNKNOWN_ROWS < mark.rows <= reaches for mark in lost):
        return known
    return {key: [*events, (_NO_NOISE.model_dump(), 1)] for key, events in known.items()}
