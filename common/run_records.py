"""Define the records that a run leaves behind, which are its events and its summary.

The server writes them (server/run_folder.py) and ``deploy.runs`` reads them. They are pure data, and the
module knows no file, no Flower and no reader. A field without which a run of 0.1 was written has a default.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from common.records import SiteError
from common.text import one_line

_Line = Annotated[str, BeforeValidator(one_line)]
"""A text that may come from a site, on one visible line."""


ENROL = "enrol"
"""The phase of what is left out while nodes are enrolled."""


class Cause(StrEnum):
    """Name the causes for which something of a site is not used.

    The set is closed, so that no text of a site becomes a label of a metric.
    """

    # What a site sends instead of an answer: the names of ``common.records.SiteError``.
    EGRESS = "egress"
    DATA = "data"
    CONFIGURATION = "configuration"
    TRAINING = "training"
    INTERNAL = "internal"
    BUDGET = "budget"
    SECURE_AGGREGATION = "secure-aggregation"
    ROUND_TAKEN = "round-taken"
    QUESTION = "question"
    UNANSWERED = "unanswered"
    # What the server sees.
    LOST = "lost"
    """The site or its app is gone, or never answered."""
    DEADLINE = "deadline"
    UNSENT = "unsent"
    UNREADABLE = "unreadable"
    UNUSABLE = "unusable"
    """Readable, and of a wrong shape, range, sender or round."""
    NOT_ADMITTED = "not-admitted"
    OTHER = "other"


FLOWER_ERRORS = {
    1: "the site could not load the app",
    2: "the app failed at the site, or the site has not approved it (fedbags site approve)",
    3: "the message was no longer there for the site",
    4: "the reply was lost",
    5: "the site is not connected",
    6: "the site was not ready for the message",
    7: "the site holds another app",
    8: "the app died at the site (killed, or out of memory)",
}
"""Flower's error codes in words (``flwr.common.constant.ErrorCode``)."""


def cause_of_code(code: int) -> Cause:
    """Return the cause of an error code that a site or Flower sent in place of a reply."""
    if code in set(SiteError):
        return Cause[SiteError(code).name]
    # Codes below those of SiteError are Flower's own, for a message or an app that was lost.
    return Cause.LOST if code < min(SiteError) else Cause.OTHER


class _Record(BaseModel):
    # A later release may write more fields than this one knows.
    model_config = ConfigDict(frozen=True, extra="ignore")


class LeftOut(_Record):
    """Record an update, evaluation or site that was not used."""

    round: int = 0
    site: _Line
    """Its name, or ``node NUMBER`` where it has none."""
    phase: str = ""
    """The message type, ``enrol`` or ``connection``."""
    cause: Cause | None = None
    """None in a run of 0.1, which wrote the reason only."""
    reason: _Line = ""


class DeclaredLoss(_Record):
    """Record that a site declared rows of its ledger lost, and its spending as stated until then."""

    round: int
    site: str
    epsilon: float | None
    delta: float | None


class BagFigures(_Record):
    """Hold the mean distances between predicted and true proportions of one level, over held-back bags.

    A figure that no site sends is None here, and no key of the JSON.
    """

    level: str
    kl: float | None = None
    """Nats; None in a private run too, where one bag can move it without bound."""
    l1: float | None = None
    """Twice the total variation, in [0, 2], or outside where its noise is larger."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class Suppression(_Record):
    """Bound the accuracies of a level of which sites suppressed small counts of test images."""

    cells: int
    """Counts that were suppressed."""
    below: int
    """They are all below this number."""
    accuracy: tuple[float, float]
    consistent_accuracy: tuple[float, float]


class LevelFigures(_Record):
    """Hold the accuracies of one level on labelled test images, each a share in [0, 1]."""

    name: str
    classes: int
    images: int = 0
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    consistent_accuracy: float
    """Accuracy of the best path from root to leaf."""
    suppressed: Suppression | None = None
    """Where it is set, the figures above are of the shown counts only."""


class SiteFigures(_Record):
    """Hold the figures of one site."""

    bags: int
    release: str
    """The mechanism of its release of label counts."""
    epsilon: float | None
    """As it stated last; None where it stated no bound."""
    levels: tuple[LevelFigures, ...] = ()


class RunSummary(_Record):
    """Hold the content of summary.json, which is written once a run has finished."""

    name: str = ""
    method: str = ""
    rounds: int
    """Rounds that were done."""
    selected_round: int = 0
    stopped_early: str | None = None
    """Why the run ended before its last round, and well."""
    sites: int = 0
    """Sites that took part at the end."""
    seconds: float = 0.0
    code: Mapping[str, str | None] = {}
    """Version and commit of the code that ran."""
    parts: tuple[Mapping[str, str], ...] = ()
    """Where parts come from that fedbags does not bring (``common.parts.provenance``)."""
    engine: str = ""
    levels: tuple[LevelFigures, ...] = ()
    bags: tuple[BagFigures, ...] = ()
    per_site: Mapping[str, SiteFigures] = {}
    statements: Mapping[str, dict[str, Any]] = {}
    """The last privacy statement of each site, as it came: whoever takes a figure from one checks it."""
    releases: Mapping[str, dict[str, Any]] = {}
    """Each site's release of label counts, without the counts."""
    losses: tuple[DeclaredLoss, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON values, without fields that were not set."""
        return self.model_dump(mode="json", exclude_unset=True)


class RunEvent(_Record):
    """Serve as the base of the events of a run, one of which is one line of metrics.jsonl."""

    event: str
    time: float = 0.0
    """When it was written, seconds since 1970."""
    round: int = 0


class Enrolled(RunEvent):
    """Record that the first round is about to start, or that a run goes on from a checkpoint."""

    event: Literal["enrolled", "resumed"] = "enrolled"
    rounds: int = 0
    """Number of rounds that the run will have."""
    sites: tuple[str, ...] = ()


class Joined(RunEvent):
    """Record that a site takes part from now on."""

    event: Literal["joined"] = "joined"
    site: str
    again: bool = False
    """Whether it took part before."""


class Left(RunEvent):
    """Record that a site's node is gone."""

    event: Literal["left"] = "left"
    site: str
    reason: str = ""


class Waiting(RunEvent):
    """Record that the run waits for sites."""

    event: Literal["waiting"] = "waiting"
    sites: tuple[str, ...] = ()
    """Names that may be meant, as far as they can be known: ``missing`` of these."""
    present: int = 0
    missing: int = 0
    quorum: int = 0


class Exchanged(RunEvent):
    """Record one question to all sites and its replies."""

    event: Literal["phase"] = "phase"
    phase: str
    """The message type."""
    seconds: float
    """From sending the first request until the last reply was taken in."""
    asked: int = 0
    replies: int = 0
    """Replies that were no errors."""
    bytes_sent: int = 0
    bytes_received: int = 0


class UpdateTaken(RunEvent):
    """Record that a site's update is part of the round's mean."""

    event: Literal["update"] = "update"
    site: str
    bags: int | None = None
    loss: float | None = None


class Stated(RunEvent):
    """Record the budget that a site has spent, as it states it (replace-one bag)."""

    event: Literal["statement"] = "statement"
    site: str
    epsilon: float | None = None
    """None where no bound holds."""
    delta: float | None = None
    budget_left: float | None = None


class SiteLeftOut(LeftOut, RunEvent):
    """Record that something of a site was not used."""

    event: Literal["left-out"] = "left-out"


class LedgerLost(DeclaredLoss, RunEvent):
    """Record that a site declared rows of its ledger lost."""

    event: Literal["ledger-lost"] = "ledger-lost"
    round: int


class CheckpointDamaged(RunEvent):
    """Record that a checkpoint was passed over because it is damaged."""

    event: Literal["checkpoint-damaged"] = "checkpoint-damaged"
    file: str
    reason: str = ""


class BagsEvaluated(RunEvent):
    """Record the figures of the sites' held-back bags after a round."""

    event: Literal["bags"] = "bags"
    levels: tuple[BagFigures, ...] = ()
    score: float | None = None
    """What the selection of the model minimises."""


class RoundDone(RunEvent):
    """Record that a round made the next model."""

    event: Literal["round"] = "round"
    updates: int = 0
    loss: float | None = None


class RoundSkipped(RunEvent):
    """Record that a round left the model as it was, since sites had unmasked their sum and it was lost."""

    event: Literal["round-skipped"] = "round-skipped"
    sites: tuple[str, ...] = ()
    reason: str = ""


class StoppedEarly(RunEvent):
    """Record that used-up privacy budgets ended the run before its last round."""

    event: Literal["stopped-early"] = "stopped-early"
    reason: str = ""


class Finished(RunEvent):
    """Record that the selected model and the summary are written."""

    event: Literal["finished"] = "finished"
    seconds: float = 0.0


class Failed(RunEvent):
    """Record the error that ended the run."""

    event: Literal["failed"] = "failed"
    reason: str = ""


_KINDS: tuple[type[RunEvent], ...] = (
    Enrolled, Joined, Left, Waiting, Exchanged, UpdateTaken, Stated, SiteLeftOut, LedgerLost,
    CheckpointDamaged, BagsEvaluated, RoundDone, RoundSkipped, StoppedEarly, Finished, Failed,
)  # fmt: skip
_KIND_OF = {name: kind for kind in _KINDS for name in get_args(kind.model_fields["event"].annotation)}


def read_event(line: Mapping[str, Any]) -> RunEvent:
    """Return the event of one line of metrics.jsonl.

    A plain ``RunEvent`` stands for a kind that this release does not know.

    Raises:
        ValueError: a field is missing, or of another type.
    """
    return _KIND_OF.get(line.get("event"), RunEvent).model_validate(line)
