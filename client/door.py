"""Answer the questions that a site answers, each through the journal and the guard, and no others.

``QUESTIONS`` lists every message type, the data that it touches and the records of its request and reply;
``admit`` refuses a question in a run that the site does not serve.

The journal has one JSON line for every message that the site handled. It is meant for the site alone:
``fedbags status`` and ``fedbags metrics`` at the site read it, and nothing of it is sent. It is written after
the guard has decided; a line holds numbers and words of ours, so no path, patient id or label can be in it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.ledger.file import LEDGER_FILE, LedgerError
from client.session import SiteSession
from client.site import DATA_PATH, KIT, journal_path
from common.config import RunConfig
from common.errors import BudgetRefused, ConfigError
from common.records import ModelUpdate, PrivacyStatement, ProportionRelease, Record
from common.secure_aggregation.records import (
    KeyAdvert,
    MaskedUpdate,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from common.text import JsonLines
from common.wire import size

log = logging.getLogger("fedbags.client")

_OTHER = "other"
"""The phase of a message of a type that the site does not know."""

Handler = Callable[[Message, SiteSession], Message]
_Answer = Callable[[Message, Context], Message]
_Guard = Callable[[Message, Context, Handler], Message]


class _Touches(Flag):
    """Name the part of a site's data that an answer is computed from."""

    NOTHING = 0
    BAGS = auto()
    """Images of bags, and the label counts of the bags."""
    TEST = auto()
    """Labelled test images."""


@dataclass(frozen=True)
class Question:
    """Describe one message type by the data that it touches and all records of its request and reply."""

    touches: _Touches
    asks: tuple[type[Record], ...]
    answers: tuple[type[Record], ...]
    private_answers: tuple[type[Record], ...] = ()
    """Records of the reply in a private run, where they differ."""

    def answers_in(self, config: RunConfig) -> tuple[type[Record], ...]:
        """Return the kinds of records of a reply in this run."""
        return self.private_answers or self.answers if config.dp.epsilon else self.answers


QUESTIONS: dict[str, Question] = {
    "query.proportions": Question(_Touches.BAGS, (), (ProportionRelease,)),
    "query.keys": Question(_Touches.NOTHING, (SessionOffer,), (KeyAdvert,)),
    "query.shares": Question(_Touches.NOTHING, (SessionPlan,), (SealedShares,)),
    "query.survivors": Question(_Touches.NOTHING, (SurvivorList,), (SurvivorSignature,)),
    "query.unmask": Question(_Touches.NOTHING, (UnmaskRequest,), (UnmaskShares,)),
    "train": Question(_Touches.BAGS, (ModelUpdate,), (ModelUpdate, PrivacyStatement)),
    "train.masked": Question(_Touches.BAGS, (ModelUpdate, MaskRequest), (MaskedUpdate, PrivacyStatement)),
    "evaluate.bags": Question(
        _Touches.BAGS, (ModelUpdate,), (ModelUpdate,), private_answers=(ModelUpdate, PrivacyStatement)
    ),
    "evaluate.test": Question(_Touches.TEST, (ModelUpdate,), (ModelUpdate,)),
}
"""By message type. A type that is not here cannot be answered."""


def admit(question: Question, session: SiteSession) -> None:
    """Refuse a question that this site does not answer in this run, before any data are opened.

    Raises:
        BudgetRefused: it touches data of a site with a privacy budget, and the run is not private.
        ConfigError: the run is private, and a real site has no budget.
    """
    if not question.touches:
        return
    cap = session.site.policy.budget.epsilon
    # The ledger sees private runs only. An exact update beside them would spend what no ledger counts.
    if not session.private and cap is not None:
        raise BudgetRefused(session.site.name, float("inf"), cap, cap)
    if session.private and cap is None and session.terms.strict:
        raise ConfigError(
            "this site has no privacy budget: write [policy.budget] epsilon and delta into site.toml"
        )


@dataclass(frozen=True)
class _Done:
    """Describe one message that the site handled."""

    time: float
    """When the reply was ready, seconds since 1970."""
    run: int
    round: int
    """The round that the server named; 0 where it named none."""
    phase: str
    """The message type."""
    seconds: float
    bytes_received: int
    bytes_sent: int
    """Bytes of the reply; 0 where an error went out instead."""
    code: int
    """The error code that went out (``SiteError``, or Flower's); 0 for a reply."""
    ledger_rows: int = 0
    """Rows of the site's ledger; 0 where it has none."""
    ledger_head: str = ""
    """Hash of the newest of them. A ledger that does not hold it was lost or rolled back."""


def _record(message: Message, context: Context, call_next: _Answer) -> Message:
    """Hand a message on, and write the outcome to the journal.

    Simulated sites keep no journal.
    """
    path = journal_path(context.node_config)
    if path is None:
        return call_next(message, context)
    started = time.monotonic()
    received = size(message.content) if message.has_content() else 0
    with _log_lines():
        reply = call_next(message, context)
        group, kind = message.metadata.group_id, message.metadata.message_type
        done = _Done(
            time=round(time.time(), 3),
            run=context.run_id,
            # The server chooses this text: nothing but a short number of it may enter the journal.
            round=int(group) if group.isdecimal() and len(group) < 10 else 0,
            phase=kind if kind in QUESTIONS else _OTHER,
            seconds=round(time.monotonic() - started, 3),
            bytes_received=received,
            bytes_sent=0 if reply.has_error() else size(reply.content),
            code=reply.error.code if reply.has_error() else 0,
            **_ledger_mark(context.node_config),
        )
        try:
            _append(path, done)
        except OSError as error:
            # The reply is worth more than the line about it, and the ledger has its own say on full disks.
            log.warning("the journal cannot be written (%(error)s)", {"error": type(error).__name__})
    return reply


def _ledger_mark(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ledger's length and head as its anchor holds them, for a line of the journal."""
    data, kit = node.get(DATA_PATH), node.get(KIT)
    if not data:
        return {}
    ledger = Path(str(data)) / LEDGER_FILE
    try:
        if not ledger.exists():
            return {}
        # Imported here: a site without a budget loads no accountants.
        from client.ledger.anchor import anchor_file

        anchor = anchor_file(ledger, Path(str(kit)) if kit else None).read()
    except (OSError, LedgerError) as error:
        # The guard has decided already: nothing here may change what goes out, or add to it.
        log.warning("the journal cannot name the ledger's row (%(error)s)", {"error": type(error).__name__})
        return {}
    return {} if anchor is None else {"ledger_rows": anchor.rows, "ledger_head": anchor.head}


def _append(path: Path, done: _Done) -> None:
    """Add a line to the journal.

    The journal's folder is made where it is missing, but not the one around it.
    """
    # No ``parents``: a kit or site folder that is missing must show, and not come into being empty.
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(done)) + "\n")


@contextmanager
def _log_lines() -> Iterator[None]:
    """Send our log lines to standard error as JSON while a message is handled.

    The executor's log keeps them.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("fedbags")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class SiteApp(ClientApp):
    """Run Flower's ClientApp so that every message, of whatever type, passes the journal and the guard.

    Flower's own refuses an unknown type before any mod sees it, in words of its own. Here ``answers`` takes
    the place of ``train``, ``evaluate`` and ``query``.

    Args:
        guard: next to the handlers, so that no reply goes around it. It opens the session that they get, and
            must let nothing pass that no handler is there for. The journal is around it, and records what
            the guard decided to send.
    """

    def __init__(self, guard: _Guard) -> None:
        # Flower's own registry of handlers stays empty: ``__call__`` below is the only way in.
        super().__init__()
        self.handlers: dict[str, Handler] = {}
        self._guard = guard

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        return _record(message, context, self._guarded)

    def answers(self, kind: str) -> Callable[[Handler], Handler]:
        """Register the handler of a message type, which must be one of ``QUESTIONS``, once."""
        # A handler for a type outside the list would be one that guard and tests do not know.
        if kind not in QUESTIONS or kind in self.handlers:
            raise ValueError(f"{kind!r} is no question, or has a handler already")

        def register(handler: Handler) -> Handler:
            self.handlers[kind] = handler
            return handler

        return register

    def _guarded(self, message: Message, context: Context) -> Message:
        return self._guard(message, context, self._handle)

    def _handle(self, message: Message, session: SiteSession) -> Message:
        return self.handlers[message.metadata.message_type](message, session)
